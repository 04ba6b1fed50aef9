"""From shards on disk to batches: records are read safely, cut into clips and shuffled."""
