"""What said where shards synchronized before there was one key `sync`. The one place that still knows."""

import re

OLD = "architecture layers_per_group sync_pattern parallel_block merge overlap".split()


def translate_old_keys(keys: dict) -> dict:
    """`keys` of a config, GPTConfig or config.json, with `sync` in the place of those that said so before.

    What has none of them comes back as it is. Raises ValueError where they name no rule.
    """
    old = {key: keys[key] for key in OLD if key in keys}
    if not old or "sync" in keys:
        return keys
    kept = {key: value for key, value in keys.items() if key not in OLD}
    name, rivals = old.get("architecture"), [old.get("overlap"), (old.get("merge") or "sum").removeprefix("sum")]
    rivals = [*filter(None, rivals), *["parallel"] * bool(old.get("parallel_block"))]
    if name == "grouped":
        n_layer, size = keys.get("n_layer", 12), old.get("layers_per_group") or 0
        if size < 1 or n_layer % size:
            raise ValueError(f"layers_per_group={size} does not divide n_layer={n_layer}")
        name = f"grouped-{n_layer // size}"
    elif name in (None, "selective"):
        name = old.get("sync_pattern") or "baseline"
    return kept | {"sync": "+".join([name, *rivals])}


def complete_config(keys: dict) -> dict:
    """config.json of an export with the keys of today. Raises ValueError as translate_old_keys does."""
    return {"qkv_bias": False, "qk_norm": False} | translate_old_keys(keys)


def with_rules(result: dict, n_layer: int | None) -> dict:
    """A result of bench.py, its candidates spelled as they are now. In older ones grouped:3 is 3 layers a group."""
    for entry in [result, *result.get("patterns", [])]:
        for key in ("candidate", "variant"):
            if match := re.search(r"grouped:(\d+)", str(entry.get(key))):
                layers = len(entry.get("pattern", "")) or n_layer
                entry[key] = entry[key].replace(match[0], f"grouped-{layers // int(match[1])}")
        if isinstance(entry.get("model"), dict):
            entry["model"] = translate_old_keys(entry["model"])
    return result
