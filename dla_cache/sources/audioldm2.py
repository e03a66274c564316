"""AudioLDM 2 fills texts up to the longest of a batch, and its language model counts what it was filled up with."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from dla_cache.sources.catalog.entry import PipelineRow
from dla_cache.sources.diffusers_source import FixUp

EMBEDDINGS = ("prompt_embeds", "attention_mask", "generated_prompt_embeds")


class EachTextAlone(FixUp):
    """Each text goes through the text models alone, as in a call with one text: then there is nothing to fill up.

    What they put out has as many steps as the text has tokens. It is filled up afterwards, where the mask reaches.
    """

    def __init__(self, pipeline: Any, row: PipelineRow, settings: Mapping[str, Any]) -> None:
        super().__init__(pipeline, row, settings)
        self.is_guided = float(settings["guidance_scale"]) > 1
        if not hasattr(pipeline.language_model, "_update_model_kwargs_for_generation"):
            pipeline.language_model = _able_to_generate(pipeline.language_model)

    def texts(self, texts: Sequence[str]) -> Mapping[str, Any]:
        """Embeddings of the texts in place of these, and of the empty text that guidance leads away from."""
        pipeline, parts = self.pipeline, []
        for text in texts:
            parts.append(pipeline.encode_prompt([text], pipeline.device, 1, self.is_guided))
        arguments = {}
        for name, of_texts in zip(EMBEDDINGS, zip(*parts, strict=True), strict=True):
            longest = max(part.shape[1] for part in of_texts)
            filled = torch.stack([_filled_up(part, longest) for part in of_texts])
            if self.is_guided:
                arguments[f"negative_{name}"] = filled[:, 0]
            arguments[name] = filled[:, -1]
        return arguments


def _filled_up(part: torch.Tensor, length: int) -> torch.Tensor:
    """[N, length] or [N, length, D] of [N, fewer] or [N, fewer, D], with zeros behind."""
    missing = length - part.shape[1]
    return pad(part, (0, missing) if part.ndim == 2 else (0, 0, 0, missing))


def _able_to_generate(model: Any) -> Any:
    """The same language model in the class that can generate: checkpoints were saved as `GPT2Model`, which no longer
    can."""
    from transformers import GPT2LMHeadModel

    with torch.device("meta"):  # nothing is drawn, and no memory taken
        able: Any = GPT2LMHeadModel(model.config)
    able.transformer, able.lm_head.weight = model, model.wte.weight
    return able.eval()
