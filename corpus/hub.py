"""The hub's client: lists, downloads and checks a data set's files, and pins them in get.json."""

import dataclasses
import hashlib
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from cli import InputError, human, write_atomic
from corpus.files import file_kind, files_below, matches

# -- the client --------------------------------------------------------------------------------------------

class Listing(NamedTuple):
    """The data files of a part."""
    repo: str                            # the id that answers
    revision: str                        # the commit that the part's revision is
    files: list[dict]                    # {"path", "size", "sha256"} sorted by path; sha256 None = not known


class Hub:
    """Where data sets come from: the hub, another one by its URL, or a folder that holds copies of them as
    owner/name/files. token: of the hub; default what `hf auth login` stored, or HF_TOKEN."""
    waits = (1, 2, 4, 8, 16, 32, 64, 128, 256)            # seconds between tries, where the hub names none

    def __init__(self, where="", token=None):
        is_url = "://" in where
        self.folder = where if where and not is_url else None
        self.endpoint = where if is_url else None
        self.token = token
        if self.folder and not os.path.isdir(self.folder):
            raise InputError(f"--hub={where} is neither a folder nor a URL")

    def patiently(self, call, repo, *args, **options):
        """call(repo, ...), tried again when the hub is overloaded or asks to wait. InputError says what is
        gated, missing or out of reach."""
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            HTTPError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
        )
        for wait in (*self.waits, None):                  # None: the last try
            try:
                return call(repo, *args, **options)
            except GatedRepoError:
                raise InputError(f"{repo} is gated: accept its terms at its page on the hub, then run "
                                 f"`hf auth login` (or set HF_TOKEN)") from None
            except OfflineModeIsEnabled:
                raise InputError(f"{repo}: HF_HUB_OFFLINE is set; unset it, or give a copy: --hub=folder "
                                 f"with {repo}/ in it") from None
            except LocalEntryNotFoundError as e:          # what hf_hub_download makes of a failed connection
                if isinstance(e.__cause__, OfflineModeIsEnabled):
                    raise InputError(f"{repo}: HF_HUB_OFFLINE is set; unset it, or give a folder with a copy"
                                     ) from None
                trouble = f"cannot be reached ({type(e.__cause__ or e).__name__})"
            except (RepositoryNotFoundError, EntryNotFoundError):
                raise
            except HfHubHTTPError as e:
                status = getattr(e.response, "status_code", None)
                if status is not None and status != 429 and status < 500:
                    raise InputError(f"{repo}: the hub answers {status} ({str(e).splitlines()[0]})") from None
                trouble = f"answers {status}"
                retry_after = getattr(e.response, "headers", {}).get("Retry-After", "")
                if wait is not None and retry_after.isdigit():
                    wait = float(retry_after)
            # HTTPError: of the HTTP library that huggingface_hub is built on, whichever it is
            except (HTTPError, ConnectionError, TimeoutError) as e:
                trouble = f"cannot be reached ({type(e).__name__})"
            if wait is None:
                raise InputError(f"{repo}: the hub {trouble}, {len(self.waits) + 1} tries; run the command "
                                 f"again later (it goes on), or give a copy: --hub=folder with {repo}/ in it")
            print(f"{repo}: the hub {trouble}; next try in {wait:g} s", flush=True)
            time.sleep(wait)

    def list(self, part):
        """The Listing of a part's data files, of the first of its ids that answers. InputError where none
        does, or has such files."""
        ids = (part.repo, *part.aliases)
        for repo in ids:
            listing = self._list_copy(repo, part) if self.folder else self._list_online(repo, part)
            if listing is None:
                continue
            if not listing.files:
                raise InputError(f"{repo} has no files {part.files} at {listing.revision[:12]}; its layout "
                                 f"has changed: edit its Part in corpus/registry.py")
            listing.files.sort(key=lambda file: file["path"])
            return listing
        if self.folder:
            reason = f"--hub={self.folder} has no such folder"
        else:
            reason = ("the hub has no such data set, or it is gated: accept its terms at its page, then run "
                      "`hf auth login`")
        raise InputError(f"{' / '.join(ids)}: {reason}")

    def _list_copy(self, repo, part):
        """The Listing of a copy in the folder, None where there is none."""
        top = os.path.join(self.folder, repo)
        if not os.path.isdir(top):
            return None
        paths = [path for path in files_below(top) if matches(path, part.files)]
        files = [{"path": path, "size": os.path.getsize(os.path.join(top, path)), "sha256": None}
                 for path in paths]
        return Listing(repo, part.revision, files)

    def _list_online(self, repo, part):
        """The Listing of a data set of the hub, None where it has none of this id."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
        api = HfApi(endpoint=self.endpoint, token=self.token)
        top = os.path.dirname(part.files.split("*")[0]) or None

        def tree(repo):
            return list(api.list_repo_tree(repo, top, recursive=True, repo_type="dataset", revision=revision))

        try:
            revision = self.patiently(api.dataset_info, repo, revision=part.revision).sha
            entries = self.patiently(tree, repo)
        except RepositoryNotFoundError:
            return None
        except EntryNotFoundError:
            entries = []
        files = []
        for entry in entries:                             # folders have no size
            if hasattr(entry, "size") and matches(entry.path, part.files):
                sha256 = entry.lfs.sha256 if entry.lfs else None
                files.append({"path": entry.path, "size": entry.size, "sha256": sha256})
        return Listing(repo, revision, files)

    def fetch(self, repo, revision, file, folder):
        """One file into folder/path, whole or not at all, checked against size and checksum; what is there
        already is left alone, what a killed call had is gone on with."""
        target = os.path.join(folder, file["path"])
        if os.path.exists(target) and os.path.getsize(target) == file["size"]:
            return
        if self.folder:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copyfile(os.path.join(self.folder, repo, file["path"]), target + ".part")
            os.replace(target + ".part", target)
        else:
            from huggingface_hub import hf_hub_download
            self.patiently(hf_hub_download, repo, file["path"], repo_type="dataset", revision=revision,
                           local_dir=folder, endpoint=self.endpoint, token=self.token)
        size, digest = os.path.getsize(target), None
        if file["sha256"]:
            with open(target, "rb") as f:
                digest = hashlib.file_digest(f, "sha256").hexdigest()
        if size != file["size"] or digest != file["sha256"]:
            os.remove(target)
            raise InputError(f"{repo}/{file['path']} arrived damaged ({size} bytes of {file['size']}); run "
                             f"the command again")

    def columns(self, repo, revision, file):
        """The columns of one file of the hub, {name: type}: of parquet only the footer is read, of others
        the beginning."""
        path = file["path"]
        kind = file_kind(path)
        with self._opened(repo, revision, path) as f:
            if kind == "parquet":
                import pyarrow.parquet as pq
                return {field.name: str(field.type) for field in pq.ParquetFile(f).schema_arrow}
            if kind == "arrow":
                import pyarrow as pa
                return {field.name: str(field.type) for field in pa.ipc.open_stream(f).schema}
            if path.endswith(".gz"):
                import gzip
                f = gzip.GzipFile(fileobj=f)
            row = json.loads(f.readline() if kind == "jsonl" else f.read())
        row = row[0] if isinstance(row, list) else row
        return {name: type(value).__name__ for name, value in row.items()}

    def _opened(self, repo, revision, path):
        """A file of the hub, open for reading: only what is read of it is fetched."""
        if self.folder:
            return open(os.path.join(self.folder, repo, path), "rb")
        from huggingface_hub import HfFileSystem
        system = HfFileSystem(endpoint=self.endpoint, token=self.token)
        return self.patiently(
            lambda repo: system.open(f"datasets/{repo}@{revision}/{path}", "rb", block_size=1 << 20), repo)


# -- which files -------------------------------------------------------------------------------------------

MARGIN = 1.1                                              # tokens got for each one that is needed: for luck


def shuffled(files, seed, repo):
    """The files in the order in which a plan takes them: by a hash of (seed, data set, path)."""
    def key(file):
        return hashlib.blake2b(repr((seed, repo, file["path"])).encode()).digest()
    return sorted(files, key=key)


def choose(files, part, need, seed):
    """The first files of the shuffled list that should hold `need` billions of tokens, a tenth more for luck;
    all, where the part's tokens are not known or it is drawn from as a whole."""
    in_order = shuffled(files, seed, part.repo)
    total = sum(file["size"] for file in files)
    if part.tokens is None or part.draw or need * MARGIN >= part.tokens or not total:
        return in_order
    taken = 0
    for n, file in enumerate(in_order, 1):
        taken += file["size"]
        if part.tokens * taken / total >= need * MARGIN:
            return in_order[:n]
    return in_order


class Download(NamedTuple):
    """What `need` billions of tokens of a part take."""
    files: str                           # "all", "3 of 40", or "?"
    gigabytes: float | None              # None = not known


def estimate(part, need, hub=None):
    """The Download of a part: exact where a hub is there to be asked, else by the sizes on its card."""
    if hub:
        files = hub.list(part).files
        chosen = choose(files, part, need, 1)
        return Download(f"{len(chosen)} of {len(files)}", sum(file["size"] for file in chosen) / 1e9)
    share = 1 if part.tokens is None or part.draw else min(1, need * MARGIN / part.tokens)
    return Download("all" if share == 1 else "?", part.gb and part.gb * share)


class Check(NamedTuple):
    """A part as the hub has it."""
    listing: Listing
    columns: dict[str, str]              # {name: type} of one of its files
    missing: list[str]                   # columns that the part needs and the file lacks


def check_part(hub, part):
    """The Check of a part by the first of its files. InputError, OSError or ValueError where there is none
    or it cannot be read."""
    listing = hub.list(part)
    first = shuffled(listing.files, 1, part.repo)[0]
    columns = hub.columns(listing.repo, listing.revision, first)
    return Check(listing, columns, [column for column in part.columns if column not in columns])


# -- downloads ---------------------------------------------------------------------------------------------

def get_part(hub, name, part, need, raw, seed, connections=4):
    """Downloads what `need` billions of tokens of a part take to raw/name; goes on where a killed call
    stopped. raw/name/get.json says what was chosen: data set, commit, files, sizes."""
    folder = os.path.join(raw, name)
    lock = read_lock(folder)
    if lock and part.revision not in ("main", lock["revision"]):
        raise InputError(f"{folder} holds revision {lock['revision'][:12]} of {lock['repo']}, "
                         f"corpus/registry.py names {part.revision[:12]}; remove the folder, or name the "
                         f"other --raw")
    if lock and lock["seed"] != seed:
        raise InputError(f"{folder} was chosen with --seed={lock['seed']}, not {seed}; give that seed, or "
                         f"another --raw")
    if lock and not hub.folder:
        part = dataclasses.replace(part, revision=lock["revision"])
    repo, revision, files = hub.list(part)
    chosen = choose(files, part, need, seed)
    if lock and len(lock["files"]) > len(chosen):         # an earlier, larger plan
        chosen = lock["files"]
    os.makedirs(folder, exist_ok=True)
    write_atomic(os.path.join(folder, "get.json"), json.dumps(
        {"repo": repo, "revision": revision, "seed": seed, "of": len(files), "files": chosen}, indent=1))
    size = sum(file["size"] for file in chosen)
    note = f" (stands in for {part.stand_in})" if part.stand_in else ""
    print(f"{name}: {len(chosen)} of {len(files)} files, {human(size)}B of {repo} at {revision[:12]}{note}",
          flush=True)
    stop = threading.Event()

    def fetch(file):
        if not stop.is_set():
            hub.fetch(repo, revision, file, folder)
        return file["size"]

    from tqdm import tqdm
    with ThreadPoolExecutor(connections) as pool, \
            tqdm(total=size, unit="B", unit_scale=True, desc=name, disable=None, leave=False) as bar:
        try:
            for fetched_bytes in pool.map(fetch, chosen):
                bar.update(fetched_bytes)
        finally:
            stop.set()


def read_lock(folder):
    """get.json of a part's folder, or None."""
    try:
        with open(os.path.join(folder, "get.json")) as f:
            return json.load(f)
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise InputError(f"{folder}/get.json is damaged ({e}); remove it and get again") from None


def is_there(raw, name):
    """Whether a part was got whole, or put under raw/name by hand; a killed get_part left get.json alone."""
    folder = os.path.join(raw, name)
    lock = read_lock(folder)
    if lock is None:
        return os.path.isdir(folder)
    return all(os.path.exists(os.path.join(folder, file["path"])) for file in lock["files"])


def raw_files(raw, name, part):
    """The files of a part under raw/name, sorted: those get.json names (all have to be there), or, where
    files were put there by hand, all that the part's glob matches."""
    folder = os.path.join(raw, name)
    lock = read_lock(folder)
    if lock:
        files = sorted(os.path.join(folder, file["path"]) for file in lock["files"])
        absent = [file for file in files if not os.path.exists(file)]
        if absent:
            raise InputError(f"{absent[0]} is missing ({len(absent)} of {len(files)} files are); run "
                             f"`python data.py get` again, it goes on")
        return files
    files = sorted(os.path.join(folder, file) for file in files_below(folder) if matches(file, part.files))
    if not files:
        raise InputError(f"{folder} holds no {part.files} of {part.repo}; run `python data.py get` first")
    return files
