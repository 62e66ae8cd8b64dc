"""Config files and --key=value: what they set, and the one line that says what is wrong with them."""

import ast
import dataclasses
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launch import ROOT, TRAIN, run_script, succeeded

import drop_syncs
import sample
from reduced_sync.configurator import configure, describe, option, parse
from reduced_sync.train.experiment import Config

pytestmark = pytest.mark.timeout(60)


@dataclasses.dataclass
class Small:
    """One key of each kind."""

    n: int = option(1, "a count")
    rate: float = option(0.5, "a rate")
    name: str = option("x", "a name")
    flag: bool = option(False, "a switch")
    label: str | None = option(None, "a name or nothing")
    folder: str = option("here", "a folder", is_path=True)
    limit: int | None = option(None, "a count or nothing")


@pytest.fixture
def write(tmp_path):
    """write('n = 2') -> the path of a new config file of this text."""
    paths = []

    def write(text):
        paths.append(tmp_path / f"config_{len(paths)}.py")
        paths[-1].write_text(text, encoding="utf-8")
        return str(paths[-1])

    return write


def fails(*argv):
    """The message of the ValueError, which has to be one line."""
    with pytest.raises(ValueError) as error:
        configure(Small, argv)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- what they set


def test_no_arguments_give_the_defaults():
    assert configure(Small, []) == Small()
    assert dataclasses.astuple(Small()) == (1, 0.5, "x", False, None, "here", None)


def test_later_files_and_arguments_override_earlier_ones(write):
    first, second = write("n = 2\nname = 'first'\nrate = 0.1"), write("n = 3\nname = 'second'")
    assert configure(Small, [first, second]) == Small(n=3, name="second", rate=0.1)
    assert configure(Small, [second, first]) == Small(n=2, name="first", rate=0.1)
    assert configure(Small, [first, second, "--n=4"]).n == 4
    assert configure(Small, ["--n=4", first, "--rate=1", second]) == Small(n=4, name="second", rate=1.0)
    assert configure(Small, ["--n=4", "--n=5"]).n == 5


def test_files_see_earlier_values(write):
    files = [write("n = 10"), write("n = n * 2\nlimit = n + 1"), write("rate = n / 4")]
    assert configure(Small, files) == Small(n=20, limit=21, rate=5.0)
    assert configure(Small, ["--n=7", write("limit = n")]) == Small(n=7, limit=1)  # arguments are on top of the files


def test_what_was_written_is_known(write):
    """A key that is written with its default's value counted as not given."""
    files = [write("import math as _m\nn = 1"), write("rate = n / 2\nif n > 1:\n    flag = True")]
    assert configure(Small, [*files, "--name=x", "--limit=None"]).given == {"n", "rate", "name", "limit"}
    assert configure(Small, []).given == set()


def test_a_tilde_is_the_home_folder_where_a_path_is_wanted(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert configure(Small, ["--folder=~/x", "--name=~/x"]) == Small(folder="/home/me/x", name="~/x")
    assert configure(Small, [write("folder = '~'")]).folder == "/home/me"
    assert configure(Small, ["--folder=a~/~"]).folder == "a~/~"


@pytest.mark.parametrize(
    "argument, key, value",
    [
        ("--n=-3", "n", -3),
        ("--n=0x10", "n", 16),
        ("--n=1_000", "n", 1000),
        ("--rate=6e-4", "rate", 6e-4),
        ("--rate=2", "rate", 2.0),
        ("--flag=True", "flag", True),
        ("--name=text with spaces", "name", "text with spaces"),
        ("--name='quoted'", "name", "'quoted'"),
        ('--name="Hello"', "name", '"Hello"'),
        ("--name='it's", "name", "'it's"),
        ("--name= two\n", "name", " two\n"),
        ("--name=\\n", "name", "\\n"),
        ("--name=None", "name", "None"),
        ("--name=a=b", "name", "a=b"),
        ("--name=", "name", ""),
        ("--name=0101", "name", "0101"),  # no literal: a leading zero
        ("--name=1111", "name", "1111"),  # a sync pattern is text, also where it looks like a number
        ("--name=2222", "name", "2222"),
        ("--name=1e5", "name", "1e5"),
        ("--label=2024", "label", "2024"),
        ("--label=text", "label", "text"),
        ("--label=None", "label", None),
        ("--label='None'", "label", "'None'"),
        ("--label=none", "label", "none"),
        ("--limit=None", "limit", None),
        ("--limit=8", "limit", 8),
    ],
)
def test_arguments_are_literals_or_text_as_it_is_typed(argument, key, value):
    config = configure(Small, ["--label=before", argument])
    assert getattr(config, key) == value and type(getattr(config, key)) is type(value)


def test_int_becomes_float_where_a_float_is_wanted(write):
    config = configure(Small, [write("rate = 3")])
    assert config.rate == 3.0 and type(config.rate) is float


def test_a_files_own_names_are_no_keys(write):
    text = """
import math
import os.path as path
from fractions import Fraction
from math import floor

_rows = 4

def double(x):
    return 2 * x

class Shape:
    width = 3

n = double(_rows) + Shape.width + floor(Fraction(3, 2)) + path.sep.count("/")
rate = math.pi
"""
    assert configure(Small, [write(text)]) == Small(n=13, rate=3.141592653589793)


def test_paths_do_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configure(Config, ["config/train_spd_12sync.py"]).sync == "spd"
    (tmp_path / "mine.py").write_text("sync = 'grouped-4'")
    assert configure(Config, ["mine.py"]).sync == "grouped-4"


# --- what is wrong with them


def test_unknown_key(write):
    known = "n, rate, name, flag, label, folder, limit"
    message = fails("--batchsize=3")
    assert "unknown key 'batchsize'" in message and known in message
    path = write("batchsize = 3")
    message = fails(path)
    assert "unknown key 'batchsize'" in message and known in message and path in message
    assert "'i'" in fails(write("for i in range(3): pass"))
    assert "''" in fails("--=3")


@pytest.mark.parametrize(
    "assignment, words",
    [
        ("n=2.5", "n must be int, not float"),
        ("n=True", "n must be int, not bool"),
        ("n='3'", "n must be int, not str"),
        ("n=None", "n must be int, not NoneType"),
        ("n=[1]", "n must be int, not list"),
        ("rate=True", "rate must be float, not bool"),
        ("rate='fast'", "rate must be float, not str"),
        ("flag=1", "flag must be bool, not int"),
        ("flag='yes'", "flag must be bool, not str"),
        ("limit=2.0", "limit must be int or None, not float"),
        ("limit=False", "limit must be int or None, not bool"),
    ],
)
def test_wrong_type(write, assignment, words):
    assert words in fails(f"--{assignment}") and f"--{assignment}: " in fails(f"--{assignment}")
    path = write(assignment)
    assert words in fails(path) and path in fails(path)


def test_wrong_type_for_text_in_a_file(write):
    assert "name must be str, not int" in fails(write("name = 3"))
    assert "name must be str, not NoneType" in fails(write("name = None"))
    assert "label must be str or None, not int" in fails(write("label = 3"))
    assert "n must be int" in fails(write("def n(): pass"))
    assert "n must be int" in fails(write("import math as n"))


def test_an_int_too_large_for_a_float():
    assert "rate must be float" in fails(f"--rate={10**400}")


@dataclasses.dataclass
class Bounded:
    """Keys with bounds."""

    count: int = option(1, "a count", least=1)
    share: float | None = option(None, "a share or nothing", least=0, below=1)
    kind: str = option("a", "a kind", allowed=("a", "b"))


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--count=0"], "count=0 must be at least 1, and below 2^63"),
        ([f"--count={2**63}"], f"count={2**63} must be at least 1, and below 2^63"),
        (["--share=-0.5"], "share=-0.5 must be at least 0, and below 1"),
        (["--share=1"], "share=1.0 must be at least 0, and below 1"),
        (["--kind=c", "--share=0.5"], "kind='c': allowed are a, b"),
    ],
)
def test_values_out_of_bounds(arguments, line):
    with pytest.raises(ValueError) as error:
        configure(Bounded, arguments)
    assert str(error.value) == line


def test_values_at_their_bounds(write):
    found = configure(Bounded, [write("share = 0.0"), f"--count={2**63 - 1}", "--kind=b"])
    assert dataclasses.astuple(found) == (2**63 - 1, 0.0, "b")
    assert configure(Bounded, ["--share=None"]).share is None
    with pytest.raises(ValueError, match="share=nan must be at least 0, and below 1"):
        configure(Bounded, [write("share = float('nan')")])


# --- commands without config files


@dataclasses.dataclass
class Listed:
    """A key of each kind, and lists."""

    names: tuple[str, ...] = option(("x", "y"), "names; at most 100 % of them")
    sizes: tuple[int, ...] = option((1,), "sizes", least=1)
    kinds: tuple[str, ...] = option((), "kinds", allowed=("a", "b"))
    rate: float = option(0.5, "a rate", least=0)
    flag: bool = option(False, "a switch")
    path: str | None = option(None, "a file or nothing", is_path=True)


@pytest.mark.parametrize(
    "arguments, changes",
    [
        ([], {}),
        (["p", "q,r", "--rate=2"], dict(names=("p", "q,r"), rate=2.0)),
        (["--sizes", "2", "3", "--rate", "1e-3"], dict(sizes=(2, 3), rate=1e-3)),
        (["--sizes=2,3", "--kinds=a,b"], dict(sizes=(2, 3), kinds=("a", "b"))),
        (["--flag", "p"], dict(flag=True, names=("p",))),
        (["--flag=False", "--path=None"], {}),
    ],
    ids=str,
)
def test_arguments_of_a_command(arguments, changes):
    assert parse(Listed, arguments, "names", "What it does.") == dataclasses.replace(Listed(), **changes)


def test_the_home_folder_of_a_command(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse(Listed, ["--path=~/x"], "names", "").path == "/home/me/x"


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--sizes", "2", "x"], "--sizes=x: sizes must be int, not str"),
        (["--sizes=2,0"], "sizes=0 must be at least 1, and below 2^63"),
        (["--kinds=a,c"], "kinds='c': allowed are a, b"),
        (["--rate=nan"], "--rate=nan: rate must be float, not str"),
        (["--flag=2"], "--flag=2: flag must be bool, not int"),
    ],
)
def test_mistakes_in_arguments_of_a_command(arguments, line):
    with pytest.raises(ValueError) as error:
        parse(Listed, arguments, "names", "")
    assert str(error.value) == line


def test_help_and_unknown_keys_of_a_command(capsys):
    for arguments, status in ((["--help"], 0), (["--rates=1"], 2), (["--rat=1"], 2)):
        with pytest.raises(SystemExit) as end:
            parse(Listed, arguments, "names", "What it does.")
        assert end.value.code == status
    out, err = capsys.readouterr()
    assert "What it does." in out and "at most 100 % of them (default: x y)" in out and "{a,b}" in out
    assert all(f"unrecognized arguments: {key}=1" in err for key in ("--rates", "--rat"))


def test_files_that_are_not_there(tmp_path):
    assert "no config file 'config/missing.py'" in fails("config/missing.py")
    assert "no config file" in fails(str(tmp_path))  # a folder
    assert "no config file" in fails("-n=3")
    assert "no config file" in fails("x" * 5000)
    assert "no config file" in fails("")
    assert "no config file" in fails("a\0b")


@pytest.mark.parametrize(
    "text, words",
    [
        ("n = = 3", "SyntaxError"),
        ("n = 1\n  rate = 2", "IndentationError"),
        ("n = 1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit()", "SystemExit"),
        ("n = batch", "NameError: name 'batch' is not defined"),
        ("import no_such_module", "no_such_module"),
        ("raise RuntimeError('first line\\nsecond line')", "RuntimeError: first line"),
        ("def f(): f()\nf()", "RecursionError"),
        ("n = '\0'", "null bytes"),
    ],
)
def test_errors_in_a_file(write, text, words):
    path = write(text)
    message = fails(path)
    assert words in message and path in message


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "binary.py").write_bytes(b"n = '\xff\xfe'")
    assert "UnicodeDecodeError" in fails(str(tmp_path / "binary.py"))


def test_an_argument_without_a_value():
    message = fails("--flag")
    assert message.startswith("--flag: ") and "--key=value" in message


# --- nothing but ValueError

KEYS = [field.name for field in dataclasses.fields(Small)]
KINDS = {"n": {int}, "rate": {float}, "name": {str}, "flag": {bool}, "label": {str, type(None)}}
KINDS |= {"folder": {str}, "limit": {int, type(None)}}
# The files are executed: no letters of a keyword or of a builtin that acts, no `*` that makes numbers huge.
code = st.text("nxb_=+-/()[]{}:,.#'\"019 \n\t\\", max_size=40)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from([*KEYS, "unknown", "_own", "n.x", "1"])
assignments = st.lists(st.builds("{} = {!r}\n".format, names, values), max_size=4).map("".join)
arguments = st.one_of(
    st.builds("--{}={!r}".format, names, values),
    st.builds("--{}={}".format, names, st.text(max_size=12)),
    st.builds("--{}".format, st.text(max_size=12)),
    st.builds("no_such_{}".format, st.text(max_size=12)),
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=code | assignments, argv=st.lists(arguments, max_size=3))
def test_only_value_errors_come_out(tmp_path, text, argv):
    path = tmp_path / "fuzz.py"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of the made-up code
        try:
            config = configure(Small, [str(path), *argv])
        except ValueError:
            return
    for key, kinds in KINDS.items():
        assert type(getattr(config, key)) in kinds


# --- help


def test_describe_has_a_line_for_every_key():
    for cls in (Config, sample.Config):
        for field, line in zip(dataclasses.fields(cls), describe(cls).splitlines(), strict=True):
            default = str(field.default).replace("\n", r"\n")
            assert line.strip().startswith(f"--{field.name}={default}") and field.metadata["meaning"] in line


def test_help_of_the_script_lists_every_key(tmp_path):
    out = succeeded(run_script([TRAIN, "--help"], cwd=tmp_path))
    assert ast.get_docstring(ast.parse(TRAIN.read_text()), clean=False) in out  # the launch manual
    for field in dataclasses.fields(Config):
        assert f"--{field.name}=" in out


def test_every_config_file_in_the_repository_is_valid():
    configs = ROOT / "config"
    for path in set(configs.glob("*.py")) - set(configs.glob("study_*.py")) - set(configs.glob("spd_*.py")):
        assert configure(Config, [str(path)]) != Config()
    dropping = [str(configs / name) for name in ("spd_smollm2.py", "spd_in_minutes.py")]
    assert configure(drop_syncs.Config, dropping[:1]) != configure(drop_syncs.Config, dropping)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    (tmp_path / "bom.py").write_bytes(b"\xef\xbb\xbf\r\n")
    fields = dataclasses.make_dataclass("Empty", [])
    assert configure(fields, [str(tmp_path / "bom.py")]) == fields()
