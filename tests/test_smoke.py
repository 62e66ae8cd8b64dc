"""The script that users run first."""

import re

from launch import ROOT, run_script

from test_all_architectures import VARIANTS


def test_every_variant_passes():
    done = run_script([ROOT / "test_all_architectures.py", "--small"], timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(re.findall(r"✓ PASS\n", done.stdout)) == len(VARIANTS) and "✗" not in done.stdout
