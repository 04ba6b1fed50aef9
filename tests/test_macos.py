"""No call that Linux alone has, outside of places that look first whether it is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINUX_ALONE = re.compile(
    r"sched_getaffinity|mallopt|malloc_trim|prctl|/proc/|/dev/shm|memfd_create|epoll|pidfd|inotify"
    r"|SIGRTM|SIGPWR|sendfile|posix_fadvise|O_DIRECT|eventfd|\bldd\b|apt-get"
)
# Where such a name stands, and what keeps it from other systems.
GUARDED = {
    "runtime/process_memory.py": "getattr(ctypes.CDLL(None)",
    "data/shared_memory.py": "if not folder.is_dir()",
    "tools/doctor.py": "if folder.is_dir()",
    "simulator/venv.py": "install_command",  # the text of an advice
}


def test_what_linux_alone_has_is_asked_for_first():
    found = {}
    for path in sorted((ROOT / "cwm_jax").rglob("*.py")):
        code = re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL)
        lines = [line for line in code.splitlines() if LINUX_ALONE.search(line.split("  #")[0])]
        if lines:
            found[path.relative_to(ROOT / "cwm_jax").as_posix()] = lines
    assert set(found) == set(GUARDED), found
    for name, guard in GUARDED.items():
        assert guard in (ROOT / "cwm_jax" / name).read_text(), (name, guard)
