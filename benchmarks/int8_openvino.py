"""OpenVINO's post-training quantization to 8 bits, for benchmarks/int8.py: `nncf.quantize` of torch's export.

The model type is transformer, the rest NNCF's defaults; it is calibrated on the texts that edgepipe's static ranges
see. It runs in OpenVINO's runtime with the hint for latency, as many threads as the others get, and float32 where it
would choose bfloat16 by itself: what isn't an integer product is as exact as on the other sides. Needs the packages
openvino and nncf (benchmarks/peer_environments/convert.txt has the versions).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

NAME = "openvino"  # of the files
PACKAGES = ("openvino", "nncf")


def missing() -> str:
    """Say which package isn't there; "" when both are."""
    return next((name for name in PACKAGES if importlib.util.find_spec(name) is None), "")


def versions() -> dict[str, str]:
    """Return the versions of the packages."""
    return {name: version(name) for name in PACKAGES}


def quantize(graph: Path, feeds: Sequence[Mapping[str, np.ndarray]], folder: Path) -> Path:
    """Quantize a float graph over what it reads in calibration; return OpenVINO's .xml, whose weights lie beside it."""
    import nncf
    import openvino

    model = openvino.Core().read_model(graph)
    quantized = nncf.quantize(
        model,
        nncf.Dataset([dict(feed) for feed in feeds]),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(feeds),
    )
    openvino.save_model(quantized, folder / "unfinished.xml")
    for end in (".bin", ".xml"):  # the .xml is what says that both are there
        (folder / f"unfinished{end}").rename(folder / f"{NAME}{end}")
    return folder / f"{NAME}.xml"


class Opened:
    """Hold a compiled model; has what `edgepipe.runtime.encoder.Encoder` asks of a graph."""

    def __init__(self, xml: Path, threads: int) -> None:
        """Compile for this CPU."""
        import openvino

        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        self._model: Any = openvino.Core().compile_model(xml, "CPU", options)
        self._request: Any = self._model.create_infer_request()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the embeddings [rows, width]."""
        found = self._request.infer(dict(inputs), share_inputs=True)
        return {"embedding": np.array(found["embedding"])}

    def integer_products(self) -> int:
        """Return the layers that multiply a weight and run on 8-bit integers, of what was compiled."""
        nodes = [node.get_rt_info() for node in self._model.get_runtime_model().get_ops()]
        facts = [(str(node["layerType"].value), str(node["runtimePrecision"].value)) for node in nodes]
        return sum(kind == "FullyConnected" and precision in ("i8", "u8") for kind, precision in facts)
