"""What a process holds, where the system tells."""

import os
from pathlib import Path


def num_files(pid: int) -> int:
    """Open descriptors; 0 where the system does not tell."""
    folder = Path(f"/proc/{pid}/fd")
    return len(os.listdir(folder)) if folder.exists() else 0


def rss_bytes(pid: int) -> int:
    """Memory that is resident; 0 where the system does not tell."""
    file = Path(f"/proc/{pid}/statm")
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if file.exists() else 0
