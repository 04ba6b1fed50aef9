"""What a process runs on: devices and hosts, memory, signals, compiled programs."""
