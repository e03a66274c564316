"""What captions give away: a latent that was made from a text with the class's name in it has seen the label.

Captions that name a class are counted when latents are made from them, and class names can be masked: taken out of
captions before a generator reads them.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from dla_cache.errors import SourceError, SpecError
from dla_cache.manifest import Label, classes_of
from dla_cache.sources.catalog import SOURCES
from dla_cache.sources.catalog.entry import CAPTION
from dla_cache.sources.table import settings_of
from dla_cache.spec import CacheSpec
from dla_cache.store import LatentStore
from dla_cache.strict_yaml import load_yaml

BAR = "|"
"""Between the words of the parameter `masked_words`."""

WORD = re.compile(r"[^\W_]+")
"""Letters and digits: underscores, hyphens and blanks separate words."""

GENITIVE = re.compile(r"\A['\u2019]s\b")
BEFORE_STOP = re.compile(r"\s+([,.;:!?])")

SHORTEST_STEM = 3
"""Letters that are left of a word without its plural's ending: `gas` is not the plural of `ga`."""

Synonyms = Mapping[str, Sequence[str]]
"""By class name: other names of the class."""


def audit_captions(
    captions: Sequence[str],
    class_names: Sequence[str],
    labels: Sequence[Label | None],
    synonyms: Synonyms | None = None,
) -> dict[str, int]:
    """Counts of captions that name a class, for a shard's commit record; nothing if there are no captions.

    Args:
        captions: [N], what each latent was made from.
        labels: [N], None for an image without one.

    Returns:
        `captions`: how many there are. `empty`: those without a word. `named`: those with the name or a synonym of any
        class. `labelled`: those of an image with a label. `own_class`: of the labelled ones those that name a class of
        their image. `words`: how many names and synonyms were looked for.

    Raises:
        SourceError: if there is another number of labels than of captions, as from a source that tells some alone.
    """
    if not captions:
        return {}
    if len(captions) != len(labels):
        raise SourceError(
            f"a source told {len(captions)} captions of {len(labels)} images", hint="let it tell one of each, or none"
        )
    names, plain = class_words(class_names, synonyms or {}), class_words(class_names, {})
    found = [names.classes_in(caption) for caption in captions]
    own = [
        not named.isdisjoint(classes_of(label)) for named, label in zip(found, labels, strict=True) if label is not None
    ]
    counts = {
        "captions": len(captions),
        "empty": sum(WORD.search(caption) is None for caption in captions),
        "named": sum(bool(named) for named in found),
        "labelled": len(own),
        "own_class": sum(own),
    }
    if synonyms:
        by_synonym = (caption for caption, named in zip(captions, found, strict=True) if named)
        counts["synonym_only"] = sum(not plain.classes_in(caption) for caption in by_synonym)
    return counts


def mask_captions(captions: Sequence[str], masked_words: str) -> list[str]:
    """Captions without the words of the parameter `masked_words`: whole words of any case, and their plurals."""
    names = _class_words(tuple((word,) for word in masked_words.split(BAR)))
    return [names.removed_from(caption) for caption in captions]


def masked_words_of(class_names: Sequence[str], synonyms: Synonyms | None = None) -> str:
    """The parameter `masked_words` that takes all names of all classes out of captions; the same in any order."""
    names = {_said(name) for names in _names_of(class_names, synonyms or {}) for name in names}
    return BAR.join(sorted(names - {""}))


def with_masked_names(spec: CacheSpec, class_names: Sequence[str], synonyms: Synonyms | None = None) -> CacheSpec:
    """The spec whose sources take all names of all classes out of captions, beside the words that it masks already.

    Raises:
        SpecError: if none of its sources reads captions, or there are no class names.
    """
    words = masked_words_of(class_names, synonyms)
    if not words:
        raise SpecError(
            "there are no class names to mask: the manifest has none", hint="leave `--mask-class-names` out"
        )
    if not any(reads_captions(entry.source, entry.parameters) for entry in spec.latents):
        raise SpecError(
            "no source of the spec reads captions, so there are none to mask", hint="leave `--mask-class-names` out"
        )
    latents = []
    for entry in spec.latents:
        if reads_captions(entry.source, entry.parameters):
            said = masked_words_of([str(entry.parameters.get("masked_words", ""))])
            masked = BAR.join(sorted({*words.split(BAR), *said.split(BAR)} - {""}))
            entry = entry.model_copy(update={"parameters": {**entry.parameters, "masked_words": masked}})
        latents.append(entry)
    return spec.model_copy(update={"latents": tuple(latents)})


def reads_captions(source: str, parameters: Mapping[str, str | int | float | bool]) -> bool:
    """Whether a source of the catalog makes its latents from captions, with parameters of a spec or of a recipe."""
    settings = settings_of(SOURCES[source].row) if source in SOURCES else {}
    prompt = parameters.get("prompt", settings.get("prompt", CAPTION))
    return "caption_tokens" in settings and CAPTION in str(prompt)


@dataclass(frozen=True, slots=True)
class ModalityAudit:
    """What the captions of a modality gave away, as its commit records have counted it."""

    modality: str
    source: str
    images: int
    """Committed."""
    reads_captions: bool
    """As the catalog says."""
    counts: dict[str, int]
    """See `audit_captions`; empty if nothing was counted."""
    n_masked_words: int

    @property
    def in_words(self) -> str:
        """One sentence."""
        if not self.counts:
            return "made from captions that nobody counted" if self.reads_captions else "no captions were read"
        n_captions, n_labelled = self.counts["captions"], self.counts["labelled"]
        told = [f"{self.counts['named']:,} of {n_captions:,} captions name a class"]
        if "synonym_only" in self.counts:
            told[0] += f", {self.counts['synonym_only']:,} by a synonym alone"
        told.append(f"{self.counts['own_class']:,} of {n_labelled:,} with a label their own")
        if self.counts["empty"]:
            told.append(f"{self.counts['empty']:,} without a word")
        if n_captions < self.images:
            told.append(f"{self.images - n_captions:,} of {self.images:,} images not counted")
        if self.n_masked_words:
            told.append(f"words that were masked: {self.n_masked_words:,}")
        return "; ".join(told)


def audit_store(store: LatentStore) -> list[ModalityAudit]:
    """What the captions of each modality gave away."""
    audits = []
    for modality in store.modalities:
        recipe, records = store.recipe(modality), store.committed(modality)
        counts: Counter[str] = Counter()
        for record in records.values():
            counts.update(record.audit)
        masked = str(recipe.parameters.get("masked_words", ""))
        audits.append(
            ModalityAudit(
                modality=modality,
                source=recipe.source,
                images=sum(len(store.kept_rows(shard)) for shard in store.shards if shard.index in records),
                reads_captions=reads_captions(recipe.source, recipe.parameters),
                counts=dict(counts),
                n_masked_words=len(masked.split(BAR)) if masked else 0,
            )
        )
    return audits


CONTROLS_OF_LABELS = frozenset({"label-embedding", "shuffled-within-class"})
"""Kinds of control latents that are made with the labels at hand."""


@dataclass(frozen=True, slots=True)
class LabelTrace:
    """Whether the latents of a modality may tell labels by the way they were made."""

    modality: str
    source: str
    saw_labels: bool
    in_words: str


def trace_labels(store: LatentStore) -> list[LabelTrace]:
    """What is known of labels in the making of each modality: its source's training, a control's, its captions."""
    traces = []
    for audit in audit_store(store):
        recipe, entry = store.recipe(audit.modality), SOURCES.get(audit.source)
        kind = str(recipe.parameters.get("kind", ""))
        saw_labels, told = False, "nothing is known of labels in its making" if entry else "a source that dla has not"
        if audit.source == "control":
            saw_labels, told = kind in CONTROLS_OF_LABELS, f"control latents, {kind}"
        elif audit.counts:
            saw_labels, told = audit.counts["own_class"] > 0, audit.in_words
        elif audit.reads_captions:
            told = audit.in_words
        if entry is not None and entry.saw_labels:
            saw_labels, told = True, entry.note
        traces.append(LabelTrace(audit.modality, audit.source, saw_labels, told))
    return traces


def read_synonyms(path: Path, class_names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Other names of classes, from a YAML file of class names and lists.

    Raises:
        SpecError: if the file cannot be read, names a class that there is not, or holds something else than texts.
    """
    synonyms = {}
    for name, others in load_yaml(path).items():
        if str(name) not in class_names:
            raise SpecError(
                f"`{path}` has synonyms of `{name}`, which is no class of the manifest",
                hint=f"its classes are {', '.join(f'`{known}`' for known in class_names[:10])}"
                + (", ..." if len(class_names) > 10 else ""),
            )
        listed = others if isinstance(others, list) else [others]
        if not listed or not all(isinstance(other, str) and WORD.search(other) for other in listed):
            raise SpecError(
                f"`{path}` gives `{name}` synonyms that are no words: `{others}`",
                hint="write a list of texts, as `cat: [kitten, tabby]`; quote what YAML takes for a number or a truth",
            )
        synonyms[str(name)] = tuple(listed)
    return synonyms


@dataclass(frozen=True, slots=True)
class ClassWords:
    """Names of classes, found in a text word by word."""

    by_first: Mapping[str, Sequence[tuple[tuple[frozenset[str], ...], frozenset[int]]]]
    """By each form of its first word: a name as the forms of its words, and its classes."""

    def classes_in(self, text: str) -> set[int]:
        """Indices of the classes that a text names: with a polar bear also those of bears."""
        words = _words_in(_composed(text))
        return {
            index for place in range(len(words)) for _, classes in self._names_at(words, place) for index in classes
        }

    def removed_from(self, text: str) -> str:
        """The text without the names. What is left names none of the classes either, nor says a blank twice."""
        text = _composed(text)
        while found := self._places_in(text):
            for start, end in reversed(found):
                text = f"{text[:start]} {GENITIVE.sub('', text[end:])}"
        return BEFORE_STOP.sub(r"\1", " ".join(text.split()))

    def _places_in(self, text: str) -> list[tuple[int, int]]:
        """Start and end of each name in a text, of those that begin at one word the longest; none lies in another."""
        words, found, place = _words_in(text), [], 0
        while place < len(words):
            length = max((length for length, _ in self._names_at(words, place)), default=0)
            if length:
                found.append((words[place].start(), words[place + length - 1].end()))
            place += max(length, 1)
        return found

    def _names_at(self, words: Sequence[re.Match[str]], place: int) -> list[tuple[int, frozenset[int]]]:
        """Number of words and classes of each name that begins at a word."""
        names = {name for form in _forms(words[place][0]) for name in self.by_first.get(form, ())}
        return [
            (len(forms), classes)
            for forms, classes in names
            if place + len(forms) <= len(words)
            and all(not one.isdisjoint(_forms(words[place + step][0])) for step, one in enumerate(forms))
        ]


def class_words(class_names: Sequence[str], synonyms: Synonyms) -> ClassWords:
    """What finds the classes' names and synonyms; of names with commas, as ImageNet has them, each part is one."""
    return _class_words(tuple(_names_of(class_names, synonyms)))


def _names_of(class_names: Sequence[str], synonyms: Synonyms) -> list[tuple[str, ...]]:
    return [
        tuple(part for one in (name, *synonyms.get(name, ())) for part in re.split(r"[,|]", one))
        for name in class_names
    ]


@lru_cache(maxsize=8)
def _class_words(names: tuple[tuple[str, ...], ...]) -> ClassWords:
    classes: dict[tuple[frozenset[str], ...], set[int]] = {}
    for index, of_class in enumerate(names):
        for name in of_class:
            forms = tuple(_forms(word) for word in WORD.findall(_composed(name)))
            if forms:
                classes.setdefault(forms, set()).add(index)
    by_first: dict[str, list[tuple[tuple[frozenset[str], ...], frozenset[int]]]] = {}
    for forms, indices in classes.items():
        for form in forms[0]:
            by_first.setdefault(form, []).append((forms, frozenset(indices)))
    return ClassWords(by_first)


def _words_in(text: str) -> list[re.Match[str]]:
    return list(WORD.finditer(text))


def _composed(text: str) -> str:
    """The text with each letter and its accents as one character, or an accent would end a word."""
    return unicodedata.normalize("NFC", text)


def _said(name: str) -> str:
    """A name as `masked_words` says it: small letters, single blanks."""
    return " ".join(WORD.findall(_composed(name).casefold()))


@lru_cache(maxsize=65536)
def _forms(word: str) -> frozenset[str]:
    """A word in small letters, and what it is the plural of, as far as its ending tells: two words are the same if
    they have a form in common."""
    word = word.casefold()
    stems = [word]
    if word.endswith("ies"):
        stems.append(f"{word[:-3]}y")
    if word.endswith("es"):
        stems.append(word[:-2])
    if word.endswith("s") and not word.endswith("ss"):
        stems.append(word[:-1])
    return frozenset(stem for stem in stems if stem == word or len(stem) >= SHORTEST_STEM)
