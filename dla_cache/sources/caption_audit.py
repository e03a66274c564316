"""Captions that a store holds, as the modality `caption`, read again: synonyms may come to mind after a build."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from transformers import AutoTokenizer

from dla_cache.errors import SourceError, StoreError
from dla_cache.leaks import ModalityAudit, Synonyms, audit_captions
from dla_cache.modality import Modality
from dla_cache.sources.captions import texts_of
from dla_cache.sources.catalog import SOURCES
from dla_cache.store import LatentStore
from dla_cache.weights import find_weights


def count_again(
    store: LatentStore, audits: Sequence[ModalityAudit], synonyms: Synonyms, captioner: str = ""
) -> list[ModalityAudit]:
    """The audits, those of modalities that hold captions counted anew and with synonyms.

    Args:
        captioner: folder or repository of the model that made the captions; the source's own if empty.

    Raises:
        StoreError: if the store holds no captions.
        SourceError: if the captioner is not on this machine, or is not the one that was used.
    """
    held = [audit.modality for audit in audits if Modality(audit.modality).kind == Modality.CAPTION]
    if not held:
        raise StoreError(
            f"`{store.path}` holds no captions to look for synonyms in",
            hint="name them when it is built, `dla cache build --synonyms`, or build the modality `caption`, too",
        )
    counts = {modality: _count(store, modality, synonyms, captioner) for modality in held}
    return [replace(audit, counts=counts.get(audit.modality, audit.counts)) for audit in audits]


def _count(store: LatentStore, modality: str, synonyms: Synonyms, captioner: str) -> dict[str, int]:
    recipe = store.recipe(modality)
    entry = SOURCES.get(recipe.source)
    weights = find_weights(captioner or (entry.model if entry is not None else ""))
    if weights.sha256 != recipe.weights_sha256:
        raise SourceError(
            f"`{captioner or weights.repo}` is not the captioner that the captions of `{modality}` were made by",
            hint="name that one with `--captioner`",
        )
    tokenizer = AutoTokenizer.from_pretrained(weights.path, local_files_only=True)
    captions, labels = [], []
    committed = store.committed(modality)
    for shard in store.shards:
        rows = store.kept_rows(shard)
        if shard.index in committed and len(rows):
            codes = store.read(modality, rows).astype(np.int64).reshape(len(rows), -1, recipe.format.shape[-1])
            captions += texts_of(codes[:, 0], tokenizer)  # of several draws the first: all say the same
            labels += store.rows.labels_of(rows)
    return audit_captions(captions, store.class_names, labels, synonyms)
