"""How many processor cores this process may use for grading."""

import os


def quota(membership="/proc/self/cgroup", mounts="/sys/fs/cgroup"):
    """Cores that the cgroups of this process, of version 1 or 2, grant it the time of; inf: no limit."""
    least = float("inf")
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)         # no controllers: version 2
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in (controllers, "cpu") if controllers else ("", "unified"):
            for folder in _upwards(path):
                least = min(least, _granted(os.path.join(mounts, mount) + folder))
    return least


def _upwards(path):
    """The path, its parents, and "" for the root: a limit of any of them counts. A container may see only the
    last one."""
    while path.strip("/"):
        yield path.rstrip("/")
        path = os.path.dirname(path.rstrip("/"))
    yield ""


def _granted(folder):
    """Cores that one cgroup grants: "max 100000" or "150000 100000" in one file, or two files."""
    words = _read(f"{folder}/cpu.max").split() or [
        _read(f"{folder}/cpu.cfs_quota_us").strip(), _read(f"{folder}/cpu.cfs_period_us").strip()]
    if len(words) != 2 or not words[0].isdigit() or not words[1].isdigit():
        return float("inf")                               # max, -1, or no such file
    return int(words[0]) / int(words[1])


def _read(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def usable_cores(ranks=None):
    """Whole cores, at least 1, of a rank that grades: those this process may run on, no more than its cgroups
    grant, shared by the ranks (None: all that torchrun has started on this machine)."""
    cores = min(len(os.sched_getaffinity(0)), quota())
    return max(1, int(cores) // (ranks or int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))


CORES = usable_cores()
