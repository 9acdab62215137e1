"""The hub's client: lists, downloads and checks a data set's files, and pins them in get.json."""

import dataclasses
import hashlib
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from cli import InputError, human, write_atomic
from corpus.files import file_kind, files_below, matches

# -- the hub -----------------------------------------------------------------------------------------------

class Hub:
    """Where data sets come from: the hub, another one by its URL, or a folder that holds copies of them as
    owner/name/files. token: of the hub; default what `hf auth login` stored, or HF_TOKEN."""
    waits = (1, 2, 4, 8, 16, 32, 64, 128, 256)            # seconds between tries, where the hub names none

    def __init__(self, where="", token=None):
        self.folder = where if where and "://" not in where else None
        self.endpoint, self.token = (None if self.folder else where or None), token
        if self.folder and not os.path.isdir(self.folder):
            raise InputError(f"--hub={where} is neither a folder nor a URL")

    def patiently(self, call, repo, *args, **more):
        """call(repo, ...), tried again when the hub is overloaded or asks to wait. InputError says what is
        gated, missing or out of reach."""
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
        )
        unreachable = HfHubHTTPError.__bases__[0]         # the error of the HTTP library it is built on
        for wait in (*self.waits, None):
            try:
                return call(repo, *args, **more)
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
                why = f"cannot be reached ({type(e.__cause__ or e).__name__})"
            except (RepositoryNotFoundError, EntryNotFoundError):
                raise
            except HfHubHTTPError as e:
                status = getattr(e.response, "status_code", None)
                if status is not None and status != 429 and status < 500:
                    raise InputError(f"{repo}: the hub answers {status} ({str(e).splitlines()[0]})") from None
                asked, why = getattr(e.response, "headers", {}).get("Retry-After", ""), f"answers {status}"
                wait = float(asked) if wait is not None and asked.isdigit() else wait
            except (unreachable, ConnectionError, TimeoutError) as e:
                why = f"cannot be reached ({type(e).__name__})"
            if wait is None:
                raise InputError(f"{repo}: the hub {why}, {len(self.waits) + 1} tries; run the command again "
                                 f"later (it goes on), or give a copy: --hub=folder with {repo}/ in it")
            print(f"{repo}: the hub {why}; next try in {wait:g} s", flush=True)
            time.sleep(wait)

    def list(self, part):
        """(repo, revision, [{"path", "size", "sha256"}]) of a part's data files, sorted by path: the id that
        answers and the commit that its revision is."""
        for repo in (part.repo, *part.aliases):
            if self.folder:
                top = os.path.join(self.folder, repo)
                if not os.path.isdir(top):
                    continue
                files = [{"path": f, "size": os.path.getsize(os.path.join(top, f)), "sha256": None}
                         for f in files_below(top) if matches(f, part.files)]
                revision = part.revision
            else:
                from huggingface_hub import HfApi
                from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
                api = HfApi(endpoint=self.endpoint, token=self.token)
                top = os.path.dirname(part.files.split("*")[0]) or None
                try:
                    revision = self.patiently(api.dataset_info, repo, revision=part.revision).sha
                    tree = self.patiently(lambda repo, api=api, top=top, revision=revision: list(
                        api.list_repo_tree(repo, top, recursive=True, repo_type="dataset",
                                           revision=revision)), repo)
                except RepositoryNotFoundError:
                    continue
                except EntryNotFoundError:
                    tree = []
                files = [{"path": f.path, "size": f.size, "sha256": f.lfs.sha256 if f.lfs else None}
                         for f in tree if hasattr(f, "size") and matches(f.path, part.files)]
            if not files:
                raise InputError(f"{repo} has no files {part.files} at {revision[:12]}; its layout has "
                                 f"changed: edit its Part in corpus/registry.py")
            return repo, revision, sorted(files, key=lambda f: f["path"])
        raise InputError(f"{' / '.join((part.repo, *part.aliases))}: "
                         + (f"--hub={self.folder} has no such folder" if self.folder else
                            "the hub has no such data set, or it is gated: accept its terms at its page, "
                            "then run `hf auth login`"))

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
        if self.folder:
            opened = open(os.path.join(self.folder, repo, path), "rb")
        else:
            from huggingface_hub import HfFileSystem
            opened = self.patiently(
                lambda repo: HfFileSystem(endpoint=self.endpoint, token=self.token).open(
                    f"datasets/{repo}@{revision}/{path}", "rb", block_size=1 << 20), repo)
        with opened as f:
            if file_kind(path) == "parquet":
                return {field.name: str(field.type) for field in pq.ParquetFile(f).schema_arrow}
            if file_kind(path) == "arrow":
                return {field.name: str(field.type) for field in pa.ipc.open_stream(f).schema}
            if path.endswith(".gz"):
                import gzip
                f = gzip.GzipFile(fileobj=f)
            line = f.readline()
            row = json.loads(line if file_kind(path) == "jsonl" else line + f.read())
            row = row[0] if isinstance(row, list) else row
            return {name: type(value).__name__ for name, value in row.items()}


def shuffled(files, seed, repo):
    """The files in the order in which a plan takes them: by a hash of (seed, data set, path)."""
    def key(file):
        return hashlib.blake2b(repr((seed, repo, file["path"])).encode()).digest()
    return sorted(files, key=key)


def choose(files, part, need, seed, margin=1.1):
    """The first files of the shuffled list that should hold `need` billions of tokens, a tenth more for luck;
    all, where the part's tokens are not known or it is drawn from as a whole."""
    order = shuffled(files, seed, part.repo)
    total, taken = sum(f["size"] for f in files), 0
    if part.tokens is None or part.draw or need * margin >= part.tokens or not total:
        return order
    for n, file in enumerate(order, 1):
        taken += file["size"]
        if part.tokens * taken / total >= need * margin:
            return order[:n]
    return order


def get_part(hub, name, part, need, raw, seed, connections=4):
    """Downloads what `need` billions of tokens of a part take to raw/name; goes on where a killed call
    stopped. raw/name/get.json says what was chosen: data set, commit, files, sizes."""
    folder = os.path.join(raw, name)
    lock = os.path.join(folder, "get.json")
    had = read_lock(folder)
    if had and part.revision not in ("main", had["revision"]):
        raise InputError(f"{folder} holds revision {had['revision'][:12]} of {had['repo']}, "
                         f"corpus/registry.py names {part.revision[:12]}; remove the folder, or name the "
                         f"other --raw")
    if had and had["seed"] != seed:
        raise InputError(f"{folder} was chosen with --seed={had['seed']}, not {seed}; give that seed, or "
                         f"another --raw")
    pinned = dataclasses.replace(part, revision=had["revision"]) if had and not hub.folder else part
    repo, revision, files = hub.list(pinned)
    chosen = choose(files, part, need, seed)
    if had and len(had["files"]) > len(chosen):           # an earlier, larger plan
        chosen = had["files"]
    os.makedirs(folder, exist_ok=True)
    write_atomic(lock, json.dumps({"repo": repo, "revision": revision, "seed": seed, "of": len(files),
                                   "files": chosen}, indent=1))
    size, stop = sum(f["size"] for f in chosen), threading.Event()
    print(f"{name}: {len(chosen)} of {len(files)} files, {human(size)}B of {repo} at {revision[:12]}"
          + (f" (stands in for {part.stand_in})" if part.stand_in else ""), flush=True)

    def fetch(file):
        if not stop.is_set():
            hub.fetch(repo, revision, file, folder)
        return file["size"]

    from tqdm import tqdm
    with ThreadPoolExecutor(connections) as pool, \
            tqdm(total=size, unit="B", unit_scale=True, desc=name, disable=None, leave=False) as bar:
        try:
            for done in pool.map(fetch, chosen):
                bar.update(done)
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
    had = read_lock(folder)
    return os.path.isdir(folder) if had is None else all(
        os.path.exists(os.path.join(folder, f["path"])) for f in had["files"])


def raw_files(raw, name, part):
    """The files of a part under raw/name, sorted: those get.json names (all have to be there), or, where
    files were put there by hand, all that the part's glob matches."""
    folder = os.path.join(raw, name)
    had = read_lock(folder)
    if had:
        files = sorted(os.path.join(folder, f["path"]) for f in had["files"])
        absent = [f for f in files if not os.path.exists(f)]
        if absent:
            raise InputError(f"{absent[0]} is missing ({len(absent)} of {len(files)} files are); run "
                             f"`python data.py get` again, it goes on")
        return files
    found = sorted(os.path.join(folder, f) for f in files_below(folder) if matches(f, part.files))
    if not found:
        raise InputError(f"{folder} holds no {part.files} of {part.repo}; run `python data.py get` first")
    return found
