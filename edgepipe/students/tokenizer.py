"""A student's tokenizer: the teacher's, made to end every source with the end token.

A decoder's tokenizer marks no end: a prompt goes on. An encoder-decoder reads a whole source, and its teacher must see
where the source ends and the answer begins, so both read `source END`. T5's and BART's tokenizers do the same. The rule
is written into tokenizer.json, where every reader of a bundle finds it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from edgepipe.artifacts import Json
from edgepipe.errors import ConfigError

_FILE = "tokenizer.json"


def with_end_token(files: Mapping[str, bytes], token_id: int) -> dict[str, bytes]:
    """Return tokenizer files whose texts end with a token; what the tokenizer did before, it does still.

    Raises ConfigError when there is no tokenizer.json, or the token isn't in it.
    """
    if _FILE not in files:
        raise ConfigError("a student needs a teacher with a tokenizer.json")
    rules = json.loads(files[_FILE])
    token = _token(rules, token_id)
    known = {token: {"id": token, "ids": [token_id], "tokens": [token]}}
    end = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    processors = _listed(rules.get("post_processor"))
    templates = [processor for processor in processors if processor["type"] == "TemplateProcessing"]
    if templates:  # two templates one after another would apply the second to each part of the first
        for part in ("single", "pair"):
            if templates[0][part][-1] != end:
                templates[0][part].append(end)
        templates[0]["special_tokens"] |= known
    else:
        processors.append(
            {
                "type": "TemplateProcessing",
                "single": [first, end],
                "pair": [first, end, second, end],
                "special_tokens": known,
            }
        )
    rules["post_processor"] = processors[0] if len(processors) == 1 else {"type": "Sequence", "processors": processors}
    return {**files, _FILE: json.dumps(rules, ensure_ascii=False).encode()}


def _listed(processor: Json | None) -> list[Json]:
    """Return the rules that apply one after another."""
    if processor is None:
        return []
    return list(processor["processors"]) if processor["type"] == "Sequence" else [processor]


def _token(rules: Json, token_id: int) -> str:
    for entry in rules.get("added_tokens") or []:
        if entry["id"] == token_id:
            return str(entry["content"])
    raise ConfigError(f"the end token {token_id} is none of the special tokens in {_FILE}")
