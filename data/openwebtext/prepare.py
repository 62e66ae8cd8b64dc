"""OpenWebText as GPT-2 tokens: train.bin, val.bin and meta.json. Or your own parquet or JSON files, the same way.

    python data/openwebtext/prepare.py                             the whole of it: hours, and about 101 GB of disk
    python data/openwebtext/prepare.py --num_proc 32               on 32 processes (default: half the CPU cores)
    python data/openwebtext/prepare.py --data_files a.parquet b.jsonl.gz     your own files, documents in column `text`
    python data/openwebtext/prepare.py --max_docs 100000           only the first so many documents
    python data/openwebtext/prepare.py --val_fraction 0.05         hold out 5 % of the documents (default: 0.0005)
    python data/openwebtext/prepare.py --out_dir DIR               write there (default: beside this script)

Each document is encoded with GPT-2's BPE and followed by one end-of-text token (50256). 0.05 % of the documents, at
least one, chosen with nanoGPT's seed, are held out for validation; of a few short ones hold out more. The files are raw
little-endian uint16. The whole set, as nanoGPT publishes it, is 8,013,769 documents:

    train.bin  18.1 GB  9,035,582,198 tokens
    val.bin     8.9 MB      4,434,897 tokens
    meta.json  vocab_size 50257, source, token counts, hashes

Disk for the whole set, checked before anything is downloaded:

    24.4 GB  the parquet files              in the Hugging Face hub's cache      80 files of 305 MB
    40.0 GB  the text as Arrow              in the datasets library's cache      a memory map of all documents
    18.1 GB  the tokens as Arrow            in the datasets library's cache      9.04e9 tokens of 2 bytes
    18.1 GB  train.bin and val.bin          in out_dir

Both caches are under ~/.cache/huggingface (move them with HF_HOME) and can be deleted afterwards. For files of your own
the estimate is 2x their size (4x for parquet and 6x for .gz, which are compressed): the text as Arrow, and twice the
tokens, of 2 bytes for every 4 bytes of text. A second call finds everything there and does nothing.

Your own files are .parquet, .jsonl or .json (a list of objects), the last two also gzipped (.gz). They are read in the
order given; other columns are left out, but each of them must keep one type.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from reduced_sync.cli import set_up

if __name__ == "__main__":  # before the imports that take seconds: Ctrl-C ends them in silence
    set_up()

import argparse
import contextlib
import ctypes
import glob
import hashlib
import math
import os
import re
import shutil
import signal
import textwrap

import numpy as np

from reduced_sync import preparing

HUB, REVISION = "Skylion007/openwebtext", "refs/convert/parquet"
N_DOCS, VAL_FRACTION = 8_013_769, 0.0005
PARQUET_BYTES, TEXT_BYTES, TOKEN_BYTES = 24_400_000_000, 40_000_000_000, 2 * (9_035_582_198 + 4_434_897)
PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when its parent ends
MOST_SPACES = 900_000  # in a row, in a document
KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".jsonl.gz": "json", ".json.gz": "json"}
COMPRESSED = {".parquet": 2, ".gz": 3}  # bytes of text in a byte of file, about


def kind_of(path):
    """The format of a file by its name, as datasets calls it; None where it is none of KINDS."""
    return next((kind for ending, kind in KINDS.items() if path.name.lower().endswith(ending)), None)


def source_of(data_files, digest, max_docs, val_fraction):
    """One line that says which documents these are: for files of one's own with the digest of their content."""
    if data_files:
        names = ", ".join(path.name for path in data_files)
        source = f"{names} (sha256 of its files' sha256s: {digest})"
    else:
        source = f"{HUB} {REVISION}"
    if max_docs:
        source += f", first {max_docs} documents"
    return source + (f", val_fraction {val_fraction}" if val_fraction != VAL_FRACTION else "")


def disk_needs(data_files, max_docs, out_dir):
    """[(folder, bytes that will be written there)], by the arithmetic at the top of this file."""
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(config.HF_DATASETS_CACHE)
    if data_files:
        text = sum(path.stat().st_size * COMPRESSED.get(path.suffix.lower(), 1) for path in data_files)
        tokens = text // 2
        return [(cache, text + tokens), (out_dir, tokens)]
    tokens = int(TOKEN_BYTES * min(1, (max_docs or N_DOCS) / N_DOCS))
    arrow_files = (cache / HUB.replace("/", "___")).rglob("*.arrow")
    downloaded = any(".incomplete" not in str(path) for path in arrow_files)
    return [
        (Path(HF_HUB_CACHE), 0 if downloaded else PARQUET_BYTES),
        (cache, tokens + (0 if downloaded else TEXT_BYTES)),
        (out_dir, tokens),
    ]


def check_disk(needs):
    """Print what is needed and free on each file system of `needs`; raise ValueError where it does not fit."""
    per_device = {}  # device: (an existing folder on it, bytes needed)
    for folder, needed in needs:
        folder = folder.absolute()
        while not folder.exists():
            folder = folder.parent
        device = folder.stat().st_dev
        first, so_far = per_device.get(device, (folder, 0))
        per_device[device] = (first, so_far + needed)
    for folder, needed in per_device.values():
        free = shutil.disk_usage(folder).free
        line = f"disk at {folder}: about {needed / 1e9:,.1f} GB needed, {free / 1e9:,.1f} GB free"
        if needed > free:
            raise ValueError(f"{line}; HF_HOME moves the caches, --out_dir the token files")
        print(line)


@contextlib.contextmanager
def ctrl_c_ends_at_once():
    """On Ctrl-C, end this process and its workers, with preparing.run's line and exit code.

    No KeyboardInterrupt: it is lost if it comes while a worker starts (Python ignores it in fork hooks), and datasets
    and its pool of processes may answer it with another exception or never end. Nothing of ours is being written.
    """
    parent = os.getpid()

    def end(number, frame):
        if os.getpid() == parent:  # not in a worker, which ends with it
            os.write(sys.stderr.fileno(), f"{preparing.INTERRUPTED}\n".encode())
            os._exit(130)

    def end_with_parent():
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(130)

    if sys.platform != "linux":  # Ctrl-C raises KeyboardInterrupt, as anywhere
        yield
        return
    libc = ctypes.CDLL(None)
    os.register_at_fork(after_in_child=end_with_parent)
    default = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, default)


def load(what, *args, **options):
    """load_dataset's split "train" with the one column `text`. Raises ValueError, which names `what`, where it cannot
    be loaded or has no such texts."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our line says what its log would
    try:
        documents = datasets.load_dataset(*args, split="train", **options)
        if isinstance(what, Path) and "text" in documents.column_names:
            documents.data["text"].validate(full=True)  # UTF-8, which the readers do not check
    except Exception as error:  # any of several libraries'
        reason = textwrap.shorten(str(error.__cause__ or error), 300) or type(error).__name__
        reason = f"no documents, or {reason}" if isinstance(what, Path) else reason
        raise ValueError(f"cannot load {what}: {reason}") from None
    if "text" not in documents.column_names:
        raise ValueError(f"{what} has no column `text` for the documents, but {documents.column_names}")
    if getattr(documents.features["text"], "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"{what}: column `text` must hold strings, it holds {documents.features['text']}")
    documents = documents.select_columns("text")
    if nulls := documents.data["text"].null_count:
        raise ValueError(f"{what}: column `text` is null in {nulls} documents: every document needs a text")
    return documents


def load_documents(data_files, digest, max_docs, num_proc):
    """The dataset with the one column `text`. Raises ValueError where it cannot be loaded or has no such texts.

    digest: of the content of data_files, by which what is made of them is cached.
    """
    from datasets import Features, Value, concatenate_datasets, config

    if data_files:  # each by itself: an error names its file; escaped: datasets expands patterns
        cache = Path(config.HF_DATASETS_CACHE, digest)  # datasets itself goes by their names and times
        parts = [
            load(path, kind_of(path), data_files=glob.escape(str(path.absolute())), cache_dir=cache)
            for path in data_files
        ]
        if len({part.features["text"].dtype for part in parts}) > 1:
            parts = [part.cast(Features({"text": Value("string")})) for part in parts]
        documents = concatenate_datasets(parts)
    else:
        documents = load(HUB, HUB, revision=REVISION, num_proc=num_proc)
        if len(documents) != N_DOCS and not (max_docs and max_docs <= len(documents)):
            raise ValueError(
                f"{HUB} {REVISION} has {len(documents):,} documents, the whole has {N_DOCS:,}: "
                f"--max_docs {len(documents)} takes what is there"
            )
    if max_docs:
        documents = documents.select(range(min(max_docs, len(documents))))
    if len(documents) < 2:
        raise ValueError(f"{len(documents)} documents: at least 2 are needed, one each for train and val")
    return documents


def tokenize(documents, encoding, val_fraction, num_proc):
    """{"train": dataset, "val": dataset} with columns `ids` (uint16, the end-of-text token included) and `len`.

    Raises ValueError where no document is left for train.
    """
    from datasets import Features, Sequence, Value

    def encode(batch):
        for text in batch["text"]:
            if len(text) >= MOST_SPACES and max(map(len, re.findall(r"\s*", text))) >= MOST_SPACES:  # tiktoken panics
                raise ValueError(f"a document has {MOST_SPACES:,} spaces in a row: remove it: {text.strip()[:60]!r}")
        ids = [
            np.array([*encoding.encode_ordinary(text), encoding.eot_token], dtype=np.uint16) for text in batch["text"]
        ]
        return {"ids": ids, "len": [len(one) for one in ids]}

    if math.ceil(val_fraction * len(documents)) == len(documents):
        raise ValueError(f"--val_fraction {val_fraction} of {len(documents)} documents leaves none for train")
    halves = documents.train_test_split(test_size=val_fraction, seed=2357, shuffle=True)
    try:
        return {
            split: half.map(
                encode,
                batched=True,
                remove_columns=["text"],
                features=Features({"ids": Sequence(Value("uint16")), "len": Value("int64")}),
                num_proc=min(num_proc, len(half)),
                desc=f"tokenizing {split}",
            )
            for split, half in (("train", halves["train"]), ("val", halves["test"]))
        }
    except (ValueError, OSError):
        raise
    except Exception as error:  # of a pool whose process was killed, any
        reason = f"{type(error).__name__} {error}".strip()
        raise ValueError(f"tokenizing failed, as for lack of memory; --num_proc 1 needs least: {reason}") from None


def chunks(tokenized, split, batch_size=1000):
    """Yield the ids of `batch_size` documents at a time, one uint16 array each."""
    from tqdm import tqdm

    batches = tokenized.with_format("arrow").iter(batch_size)
    for table in tqdm(batches, total=-(-len(tokenized) // batch_size), desc=f"writing {split}.bin"):
        yield table["ids"].combine_chunks().flatten().to_numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_files", type=Path, nargs="+", help="local files instead of the hub")
    parser.add_argument("--max_docs", type=int, help="use only the first so many documents (at least 2)")
    fraction = "the part of the documents that is held out, rounded up (default: %(default)s, nanoGPT's)"
    parser.add_argument("--val_fraction", type=float, default=VAL_FRACTION, help=fraction)
    parser.add_argument("--num_proc", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="default: %(default)s")
    parser.add_argument("--out_dir", type=Path, default=Path(__file__).resolve().parent, help="default: %(default)s")
    args = parser.parse_args()

    if args.num_proc < 1:
        raise ValueError(f"--num_proc is {args.num_proc}: it must be at least 1")
    if args.max_docs is not None and args.max_docs < 2:
        raise ValueError(f"--max_docs is {args.max_docs}: it must be at least 2, one each for train and val")
    preparing.check_fraction(args.val_fraction)
    for path in args.data_files or []:
        if kind_of(path) is None:
            raise ValueError(f"--data_files has {path}: allowed are {', '.join(KINDS)}")
        if sum(path.resolve() == other.resolve() for other in args.data_files) > 1:
            raise ValueError(f"--data_files has {path} twice: documents held out would be in train, too")

    digest = hashlib.sha256("".join(map(preparing.file_sha256, args.data_files or [])).encode()).hexdigest()
    source = source_of(args.data_files, digest, args.max_docs, args.val_fraction)
    meta = dict(vocab_size=50257, tokenizer="gpt2", source=source)
    if preparing.is_complete(args.out_dir / "meta.json", **meta):
        print(f"{args.out_dir}: already there, {source}")
        return
    check_disk(disk_needs(args.data_files, args.max_docs, args.out_dir))
    encoding = preparing.gpt2_encoding()
    with ctrl_c_ends_at_once():
        documents = load_documents(args.data_files, digest, args.max_docs, args.num_proc)
        tokenized = tokenize(documents, encoding, args.val_fraction, args.num_proc)
    splits = {
        split: (int(dataset.with_format("numpy")["len"][:].sum()), chunks(dataset, split))
        for split, dataset in tokenized.items()
    }
    print(preparing.write_dataset(args.out_dir, splits, **meta))


if __name__ == "__main__":
    preparing.run(main)
