"""OpenVINO GenAI's block: `LLMPipeline.generate` on token ids, with a streamer that notes when each token came."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peer_blocks.block import Engine, Moments, Peer, Score, log_softmax_at, main


def properties(threads: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what the CPU plugin is asked for: one stream, a number of threads, and the settings."""
    return {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY", **settings}


def open_pipeline(path: Path, threads: int, settings: dict[str, Any]) -> Engine:
    """Load a pipeline; prompts differ, so no cache of prefixes can help it."""
    import openvino as ov
    import openvino_genai as og

    asked = {key: value for key, value in settings.items() if key != "ATTENTION_BACKEND"}
    backend = settings["ATTENTION_BACKEND"]
    more: dict[str, Any] = {"ATTENTION_BACKEND": backend}
    if backend == "PA":
        scheduler = og.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        more["scheduler_config"] = scheduler
    pipeline = og.LLMPipeline(str(path), "CPU", **properties(threads, asked), **more)

    class Notes(og.StreamerBase):  # type: ignore[misc]  # untyped package
        """Note when each token came."""

        def __init__(self) -> None:
            super().__init__()
            self.moments: Moments = []
            self.ids: list[int] = []
            self.begun = time.perf_counter()

        def write(self, token: Any) -> Any:
            """Take one token, or several."""
            for one in token if isinstance(token, list) else [token]:
                self.moments.append(time.perf_counter() - self.begun)
                self.ids.append(int(one))
            return og.StreamingStatus.RUNNING

        def end(self) -> None:
            """Do nothing: the moments are there."""

    def generate(prompt: list[int], new_tokens: int) -> tuple[Moments, list[int]]:
        ids = np.array([prompt], np.int64)
        inputs = og.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        config = og.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new_tokens
        config.do_sample = False
        notes = Notes()
        pipeline.generate(inputs, config, notes)
        return notes.moments, notes.ids

    return Engine(generate=generate, facts={"version": og.__version__})


def score_model(path: Path, threads: int, settings: dict[str, Any]) -> Score:
    """Score a window in one run of the same model file, through the runtime below the pipeline."""
    import openvino as ov

    asked = {key: value for key, value in settings.items() if key != "ATTENTION_BACKEND"}
    compiled = ov.Core().compile_model(str(path / "openvino_model.xml"), "CPU", properties(threads, asked))
    request = compiled.create_infer_request()

    def score(ids: list[int]) -> np.ndarray:
        request.reset_state()
        tokens = np.array([ids], np.int64)
        inputs = {
            "input_ids": tokens,
            "attention_mask": np.ones_like(tokens),
            "position_ids": np.arange(len(ids), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        logits = request.infer(inputs)["logits"][0]
        return log_softmax_at(np.asarray(logits[:-1], np.float32), ids[1:])

    return score


if __name__ == "__main__":
    main(Peer(open=open_pipeline, score=score_model))
