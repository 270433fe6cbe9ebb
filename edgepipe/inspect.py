"""Inspect: what is inside a model or a bundle: layers, parameters, bytes per part, bits per weight."""

from __future__ import annotations

from pathlib import Path

from edgepipe.artifacts import Json


def inspect_any(reference: str) -> Json:
    """Return the facts of a bundle directory, or of any MODEL that compress takes; nothing large is read."""
    path = Path(reference)
    if (path / "manifest.json").is_file():
        return inspect_bundle(path)
    return inspect_model(reference)


def inspect_bundle(path: Path) -> Json:
    """Return a bundle's facts from its checked manifest. Raises ConfigError or ContractError when it is damaged."""
    from edgepipe.runtime.bundle import read_bundle

    manifest = read_bundle(path).manifest
    weights = manifest["weights"]
    return {
        "kind": "bundle",
        "name": manifest["name"],
        "task": manifest["task"],
        "engine": manifest["engine"],
        "layers": manifest["model"].get("layers"),
        **{name: manifest["model"][name] for name in ("encoder_layers",) if name in manifest["model"]},
        "context": manifest["model"]["context"],
        "parameters": weights["parameters"],
        "weight_bytes": weights["bytes"],
        "bundle_bytes": sum(f["bytes"] for f in manifest["files"].values()),
        "bits_per_weight": weights["bits_per_weight"],
        "cache_bytes": (manifest["cache"] or {}).get("bytes"),
        "licence": manifest["licence"]["id"],
        "parts": weights["parts"],
    }


def inspect_model(reference: str) -> Json:
    """Return a source model's facts. Raises ConfigError when there is no such model."""
    from edgepipe.bundle import weight_parts
    from edgepipe.sources import open_model

    model = open_model(reference)
    weights = model.weights
    return {
        "kind": "model",
        "name": model.info.name,
        "task": model.info.task,
        "model_type": model.info.config.get("model_type"),
        **_layers(model.info.config),
        "parameters": weights.parameters,
        "weight_bytes": weights.nbytes,
        "bits_per_weight": round(8 * weights.nbytes / weights.parameters, 4),
        "licence": model.info.licence.id,
        "parts": weight_parts(weights, model.info.embeddings),
    }


def _layers(config: Json) -> Json:
    """Return the layers that a config names; of a student those of each stack."""
    from edgepipe.students.config import is_student

    if not is_student(config):
        return {"layers": config.get("num_hidden_layers")}
    encoder = config["encoder"]["num_hidden_layers"]
    if "decoder" not in config:
        return {"layers": encoder}
    return {"layers": config["decoder"]["num_hidden_layers"], "encoder_layers": encoder}
