"""Run a bundle with onnxruntime and tokenizers alone, greedily: what an app in another language would do.

    python examples/bare_onnxruntime.py BUNDLE "The river carried"

docs/bundle.md describes the graph's inputs and outputs; this is the whole of what a runtime has to do with them.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import onnxruntime
import tokenizers

NEW_TOKENS = 24


def continue_text(bundle: Path, prompt: str, new_tokens: int) -> tuple[str, list[int]]:
    """Return the greedy continuation of a prompt, as text and as ids."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    tokenizer = tokenizers.Tokenizer.from_file(str(bundle / manifest["tokenizer"]["file"]))
    options, weights = onnxruntime.SessionOptions(), manifest["weights"]
    if "unpacked" in weights:  # stored deflated: onnxruntime takes the bytes in place of the file that the graph names
        content = zlib.decompress((bundle / weights["file"]).read_bytes())
        options.add_external_initializers_from_files_in_memory([weights["unpacked"]["file"]], [content], [len(content)])
    session = onnxruntime.InferenceSession(str(bundle / manifest["graphs"]["decoder"]), options)
    binding = session.io_binding()
    shape = manifest["cache"]["shape"]  # [1, kv_heads, context, head_dim]
    buffers = []  # onnxruntime writes into these: they must live as long as the binding
    for layer in range(manifest["cache"]["layers"]):
        for kind in ("key", "value"):
            buffers.append(np.zeros(shape, manifest["cache"]["dtype"]))
            value = onnxruntime.OrtValue.ortvalue_from_numpy(buffers[-1])
            binding.bind_ortvalue_input(f"past_{kind}.{layer}", value)  # past and present are the same memory
            binding.bind_ortvalue_output(f"present_{kind}.{layer}", value)
    ids, past, produced = tokenizer.encode(prompt).ids, 0, []
    while len(produced) < new_tokens and past + len(ids) <= manifest["model"]["context"]:
        total = past + len(ids)
        binding.bind_cpu_input("input_ids", np.array([ids], np.int64))
        binding.bind_cpu_input("seqlens_k", np.array([total - 1], np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array([total], np.int32))
        binding.bind_cpu_input("logits_positions", np.array([[len(ids) - 1]], np.int64))
        binding.bind_output("logits", "cpu")
        session.run_with_iobinding(binding)
        token = int(binding.get_outputs()[-1].numpy()[0, 0].argmax())
        if token in manifest["model"]["eos_token_ids"]:
            break
        produced.append(token)
        ids, past = [token], total
    return tokenizer.decode(produced), produced


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit('give a bundle and a prompt: python examples/bare_onnxruntime.py BUNDLE "The river carried"')
    print(continue_text(Path(sys.argv[1]), sys.argv[2], NEW_TOKENS)[0])
