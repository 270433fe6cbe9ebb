"""Run optimum's exporter: a script for the Python of another environment, started by path and never imported.

    python -I optimum_child.py MODEL_DIRECTORY OUTPUT_DIRECTORY TASK AUTO_CLASS

That environment has an older transformers and no edgepipe need be there, so nothing of edgepipe is imported. What came
out is told in OUTPUT_DIRECTORY/result.json: {"graph", "versions"}, {"missing"} when a package is, or {"error"} with one
sentence.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

_OPSET = 18  # the newest that the tracer of optimum 2.1 writes without gaps; edgepipe converts what it reads
_PACKAGES = ("optimum-onnx", "optimum", "transformers", "torch", "onnx")


def export(directory: str, output: str, task: str, auto_class: str) -> dict[str, Any]:
    """Trace the model in `directory` for `task` into `output`; weights keep their names and layout."""
    import transformers
    from optimum.exporters.onnx import onnx_export_from_model
    from optimum.exporters.tasks import TasksManager

    config = transformers.AutoConfig.from_pretrained(directory)
    known = TasksManager._SUPPORTED_MODEL_TYPE.get(config.model_type, {}).get("onnx", {})
    if task not in known:
        tasks = ", ".join(name for name in known if not name.endswith("-with-past"))
        return {"error": f"optimum has no export of {config.model_type} for {task}; it has {tasks or 'none'}"}
    # eager: attention as plain products, which every opset can say
    model, found = getattr(transformers, auto_class).from_pretrained(
        directory, local_files_only=True, output_loading_info=True, attn_implementation="eager"
    )
    missing = sorted(found["missing_keys"])
    if missing and task != "feature-extraction":  # an encoder may lack the pooler that training used
        return {"error": f"transformers {transformers.__version__} wants a weight {missing[0]}, which a newer one has "
                         "under another name"}  # fmt: skip
    onnx_export_from_model(
        model.eval(),
        Path(output),
        opset=_OPSET,
        task=task,
        do_validation=False,
        no_post_process=True,
        do_constant_folding=False,  # folding would transpose weights and give them numbers for names
    )
    graphs = sorted(path.name for path in Path(output).glob("*.onnx"))
    if len(graphs) != 1:
        return {"error": f"optimum wrote {', '.join(graphs) or 'no graph'}, where one graph was expected"}
    return {"graph": graphs[0], "versions": {name: metadata.version(name) for name in _PACKAGES}}


def end_with_parent() -> None:
    """End this process when the one that holds the other end of its stdin does, however that ends."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()


def main(arguments: list[str]) -> None:
    """Export and tell how it went."""
    end_with_parent()
    try:
        result = export(*arguments)
    except ImportError as error:
        result = {"missing": str(error)}
    except Exception as error:  # torch.onnx and transformers raise dozens of classes
        reason = " ".join(str(error).split())[:300]
        result = {"error": f"optimum's exporter failed: {reason or type(error).__name__}"}
    (Path(arguments[1]) / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
