"""Names of earlier versions: of the keys that said where shards synchronize, and of bench.py's results.

They are translated here alone.
"""

import re

OLD = "architecture layers_per_group sync_pattern parallel_block merge overlap".split()
RESULT = {"patterns": "rows", "variant": "candidate", "stream": "read_rate", "rival": "reference"}
TIMES = {"rival_": "reference_times", "compiled_silent_": "compiled_silent", "compiled_": "compiled"}  # prefixes


def translate_old_keys(keys: dict) -> dict:
    """`keys` of a config, GPTConfig or config.json, with `sync` in the place of those that said so before.

    What has none of them comes back as it is. Raises ValueError where they name no rule.
    """
    old = {key: keys[key] for key in OLD if key in keys}
    if not old or "sync" in keys:
        return keys
    kept = {key: value for key, value in keys.items() if key not in OLD}
    name, methods = old.get("architecture"), [old.get("overlap"), (old.get("merge") or "sum").removeprefix("sum")]
    methods = [*filter(None, methods), *["parallel"] * bool(old.get("parallel_block"))]
    if name == "grouped":
        n_layer, size = keys.get("n_layer", 12), old.get("layers_per_group") or 0
        if size < 1 or n_layer % size:
            raise ValueError(f"layers_per_group={size} does not divide n_layer={n_layer}")
        name = f"grouped-{n_layer // size}"
    elif name in (None, "selective"):
        name = str(old.get("sync_pattern") or "baseline")  # of digits alone an argument is a number
    return kept | {"sync": "+".join([name, *methods])}


def complete_config(keys: dict) -> dict:
    """config.json of an export with the keys of today. Raises ValueError as translate_old_keys does."""
    return {"qkv_bias": False, "qk_norm": False} | translate_old_keys(keys)


def translate_old_result(result: dict, n_layer: int | None) -> dict:
    """A result of bench.py, or a row of one, with the names of today. In older ones grouped:3 is 3 layers a group."""
    new = {}
    for key, value in result.items():
        prefix = next((prefix for prefix in TIMES if key.startswith(prefix)), "") if "patterns" in result else ""
        if prefix:
            new.setdefault(TIMES[prefix], {})[key.removeprefix(prefix)] = value
        else:
            new[RESULT.get(key, key)] = value
    if match := re.search(r"grouped:(\d+)", str(new.get("candidate"))):
        layers = len(new.get("pattern", "")) or n_layer
        new["candidate"] = new["candidate"].replace(match[0], f"grouped-{layers // int(match[1])}")
    if isinstance(new.get("model"), dict):
        new["model"] = translate_old_keys(new["model"])
    if isinstance(new.get("rows"), list):
        new["rows"] = [translate_old_result(row, n_layer) for row in new["rows"]]
    return new
