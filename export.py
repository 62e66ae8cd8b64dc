"""Export a trained model as a Hugging Face folder, for transformers, serving and evaluation.

$ python export.py out-spd-12sync --to=spd-12sync           # the last checkpoint
$ python export.py out-spd-12sync --to=spd-12sync --best    # the one with the lowest validation loss

A model that equals a dense one, because it has all syncs or only one shard, becomes a plain GPT-2, Llama, Qwen2 or
Qwen3, which transformers loads without our code; a Mistral becomes a Llama, which computes the same. Any other model
carries its code and loads with trust_remote_code=True. The folder includes the tokenizer and a README.md that says what
the model is. train_reduced_sync.py and sample.py read it with --init_from=FOLDER. You can also export a run that has
not finished.
"""

from reduced_sync.cli import set_up

if __name__ == "__main__":  # before the imports that take seconds: Ctrl-C ends them in silence
    set_up()

import sys
from dataclasses import dataclass
from pathlib import Path

from reduced_sync.cli import one_line_errors
from reduced_sync.configurator import option, parse
from reduced_sync.hf.export import export


@dataclass
class Options:
    """Every key."""

    out_dir: tuple[str, ...] = option((), "folder of the checkpoint", is_path=False)
    to: str = option("", "the folder to make; it must not exist", is_path=True)
    best: bool = option(False, "export ckpt_best.pt instead of ckpt.pt")


def main(argv):
    with one_line_errors():
        options = parse(Options, argv, "out_dir", __doc__)
        if len(options.out_dir) != 1 or not options.to:
            raise ValueError("name one out_dir, and the folder to make: python export.py OUT_DIR --to=FOLDER")
        if Path(options.out_dir[0]).is_file():
            raise ValueError(f"{options.out_dir[0]} is a file: name the folder that it is in")
        path = Path(options.out_dir[0]) / ("ckpt_best.pt" if options.best else "ckpt.pt")
        print(export(path, Path(options.to)))


if __name__ == "__main__":
    main(sys.argv[1:])
