"""Text to ids and back: the seven models through the `tokenizers` library, and 512 ids for the toy world.

Three rules give a document the same ids everywhere (each, broken, is a known bug of some code base):
  1. encode() neither adds special ids nor reads them out of the text: "</s>" in a web page is prose, never a
     separator. What is special, tokenizer.json says: a <think> with `special: false` is read as one id.
  2. The ids around a document are placed by documents() and nowhere else; no post-processor is trusted.
  3. save() writes the files that were loaded, byte for byte: transformers and vLLM read what we read.

The toy vocabulary is a tiktoken Encoding made of the constants below (named encodings are downloaded, this is
not); it is saved as a tokenizer.json that gives the same ids.

    tok = load_tokenizer("checkpoints/granite-4-h-micro")          # or toy_tokenizer()
    tok.decode(tok.encode("2 + 2 = 4")) == "2 + 2 = 4"
    tok.document("one page") == [*tok.encode("one page"), tok.eos_id]
"""

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers

from cli import InputError

# the files of a tokenizer: the first defines the ids, the others are carried along for who reads the folder
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
         "vocab.json", "merges.txt", "tokenizer.model", "tekken.json", "chat_template.jinja")


class Tokenizer:
    """A tokenizer as its files define it; made by load_tokenizer() or toy_tokenizer(), and safe to pickle.

    eos_id, bos_id, pad_id: the last two are None where the model has none
    bos_ids: the ids in front of every document: [bos_id], or [] where there is none but the eos
    vocab_size: 1 + the largest id there is; a model may have more rows (embeddings are often padded)
    fingerprint: sha256 of what decides the ids of documents(): normalizer, pre-split, vocabulary, merges,
        added tokens, and the ids placed around. Not of the file's spelling; the same after save and load.
    """

    def __init__(self, files: dict[str, bytes], eos=None, bos=None, pad=None):
        """files: content by name; eos, bos, pad: id, token text or None. ValueError if one is amiss."""
        self.files = files
        self.fast, self.guard = None, None             # see faster()
        try:
            self.backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        except ValueError as error:
            raise InputError(f"tokenizer.json cannot be read ({error}); fetch it again") from error
        self.backend.encode_special_tokens = True      # rule 1; kept neither in the file nor by pickle
        self.backend.no_truncation()                   # a file saved after fine-tuning may cut texts at 512
        self.backend.no_padding()
        self.vocab_size = 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

        self.eos_id = self._special_id("eos", eos)
        self.bos_id = self._special_id("bos", bos)
        self.pad_id = self._special_id("pad", pad)
        if self.eos_id is None:
            raise InputError("no eos: name eos_token_id in config.json or eos_token in tokenizer_config.json")
        # Granite's config names bos = eos because the model has no bos; one separator is enough
        self.bos_ids = [] if self.bos_id in (None, self.eos_id) else [self.bos_id]
        self.fingerprint = self._fingerprint()

    def _special_id(self, kind: str, token: int | str | None) -> int | None:
        if token is None:
            return None
        id = self.backend.token_to_id(token) if isinstance(token, str) else token
        is_id = isinstance(id, int) and 0 <= id < self.vocab_size
        text = self.backend.id_to_token(id) if is_id else None
        if text is None:
            raise InputError(f"{kind} is {token!r}, none of the {self.vocab_size} tokens of tokenizer.json: "
                             f"see {kind}_token_id in config.json, {kind}_token in tokenizer_config.json")
        if id in self.encode(text):
            raise InputError(f"{kind} is {text!r} (id {id}), which ordinary text can spell, so a document "
                             "could forge it: give it `special: true` in added_tokens of tokenizer.json")
        return id

    def _fingerprint(self):
        spec = json.loads(self.files["tokenizer.json"])
        if "merges" in spec["model"]:
            spec["model"]["merges"] = _merges(spec["model"])
        parts = [spec.get(key) for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")]
        text = json.dumps([*parts, self.bos_ids, [self.eos_id]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def __reduce__(self):
        arguments = (self.files, self.eos_id, self.bos_id, self.pad_id)
        return type(self), arguments, {"fast": self.fast, "guard": self.guard}

    def encode(self, text: str) -> list[int]:
        """The ids of the text and no others: nothing is added, and no special id is made whatever the text
        spells. A lone surrogate (a broken JSON escape, not encodable as UTF-8) counts as U+FFFD."""
        return self.backend.encode(_utf8(text), add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """encode() of each text, on all cores."""
        batch = self.backend.encode_batch_fast([_utf8(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: list[int]) -> str:
        """The text of the ids, special tokens spelled out, bytes that are no UTF-8 as U+FFFD.

        decode(encode(text)) == text for byte-level vocabularies. SentencePiece (Mistral-7B) drops a space in
        front: decode a text as a whole, not in parts. Raises ValueError on an id outside the vocabulary.
        """
        return self.backend.decode(self._known(ids), skip_special_tokens=False)

    def _known(self, ids):
        wrong = [id for id in ids if not 0 <= id < self.vocab_size]        # the library would skip in silence
        if wrong:
            raise InputError(f"id {wrong[0]} has no text: the tokenizer's vocab_size is {self.vocab_size}. "
                             "A model's head may have more rows than that; do not sample from the rest")
        return ids

    def documents(self, texts: list[str]) -> list[list[int]]:
        """Each text with the ids that separate documents: the bos in front, if there is one that is not the
        eos, and the eos behind. [bos, ..., eos] for Llama, Mistral, Nemotron; [..., eos] for Granite, toy."""
        return [[*self.bos_ids, *ids, self.eos_id] for ids in self.encode_batch(texts)]

    def document(self, text: str) -> list[int]:
        """documents() of one text."""
        return [*self.bos_ids, *self.encode(text), self.eos_id]

    def document_arrays(self, texts: list[str], dtype=np.uint32) -> list[np.ndarray]:
        """documents() as arrays, on one core: through faster() where it has been called and found a way."""
        texts = [_utf8(text) for text in texts]
        encoded = [self._fast_ids(text) for text in texts]
        left = [i for i, ids in enumerate(encoded) if ids is None]
        for i, ids in zip(left, self.encode_batch([texts[i] for i in left]), strict=True):
            encoded[i] = ids
        front = np.array(self.bos_ids, dtype)
        end = np.array([self.eos_id], dtype)
        return [np.concatenate([front, np.asarray(ids, dtype), end]) for ids in encoded]

    def _fast_ids(self, text):
        """encode() by tiktoken, None where it is not to be used."""
        is_guarded = self.guard is not None and self.guard.search(text)
        if self.fast is None or is_guarded:
            return None
        try:
            return self.fast.encode_to_numpy(text, disallowed_special=())
        except ValueError:                             # a million spaces overflow its regex engine's stack
            return None

    def faster(self) -> str:
        """Lets document_arrays() encode with tiktoken (about four times as fast), which gives the same ids:
        proved for the merges, tried on every character for the split. Returns the encoder's name and, where
        no such proof is to be had, the reason. Seconds for a large vocabulary."""
        try:
            self.fast, self.guard = _same_ids_from_tiktoken(self)
            return "tiktoken"
        except NoProof as reason:
            return f"tokenizers ({reason})"

    def save(self, folder: str | Path) -> None:
        """Writes the files into the folder (made if need be): for us, transformers and vLLM to load."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)


def _utf8(text: str) -> str:
    """The text with U+FFFD for what UTF-8 cannot encode."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _merges(model):
    """The merges of a BPE model as pairs: "a b" in older files, ["a", "b"] in newer ones."""
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]


def load_tokenizer(folder: str | Path, config: dict | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint's folder.

    config: the content of config.json. Its eos_token_id (of a list, the first), bos_token_id and pad_token_id
        hold where the key is there, null too; else eos_token, ... of tokenizer_config.json.
    Raises FileNotFoundError if there is no tokenizer.json, ValueError if a file or a special id is wrong.
    """
    folder, config = Path(folder), config or {}
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    if "tokenizer.json" not in files:
        raise InputError(f"{folder}: {_what_is_missing(folder, files)}")
    try:
        settings = json.loads(files.get("tokenizer_config.json", "{}"))
    except ValueError as error:
        raise InputError(f"{folder}: tokenizer_config.json cannot be read ({error}); fetch it") from error
    special = {}
    for kind in ("eos", "bos", "pad"):
        token = settings.get(f"{kind}_token")
        token = token["content"] if isinstance(token, dict) else token
        id = config.get(f"{kind}_token_id", token)
        special[kind] = id[0] if isinstance(id, list) else id
    try:
        return Tokenizer(files, **special)
    except ValueError as error:
        raise InputError(f"{folder}: {error}") from error


def _what_is_missing(folder, files):
    """Why a folder has no tokenizer.json, and the fix."""
    if not folder.is_dir():
        return "no such folder"
    other_formats = " and ".join(files.keys() & {"tokenizer.model", "tekken.json", "vocab.json"})
    if not other_formats:
        return "no tokenizer.json; fetch it and tokenizer_config.json from the model's page"
    return (f"no tokenizer.json, only {other_formats}; transformers can convert: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)")


# -- the same ids from tiktoken ------------------------------------------------------------------------------

class NoProof(Exception):
    """Why tiktoken might give other ids than the tokenizer."""


def _same_ids_from_tiktoken(tokenizer):
    """(Encoding, guard): the Encoding gives the ids of tokenizer.encode for every text in which the guard, a
    compiled regular expression or None, finds nothing. NoProof says why there is none.

    A text is split, and each piece merged by itself. The splits are compared by trying every character (the
    regex engines may know different editions of Unicode); that the merges agree is proved, see _ranks.
    """
    spec = json.loads(tokenizer.files["tokenizer.json"])
    if spec.get("normalizer") or not _is_plain_bpe(spec["model"]):
        raise NoProof("not plain byte-level BPE")
    pattern = _split(spec.get("pre_tokenizer"))
    if UNSURE.search(pattern):
        raise NoProof("its split uses what regex engines disagree on")
    added = {token["id"]: token for token in spec.get("added_tokens") or ()}
    ranks = _ranks(spec["model"], added)
    fast = tiktoken.Encoding("fast", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for token in added.values():                       # one that is a word of the vocabulary as well
        text = token["content"]
        if token["special"] and fast.encode_ordinary(text) != tokenizer.encode(text):
            raise NoProof(f"text can spell its special token {text!r}")
    odd = _odd_characters(tokenizer, fast)
    if len(odd) > 10_000:
        raise NoProof("tiktoken's regex engine splits its text otherwise")
    # Texts that spell an added token, which is one id whatever the split, or hold an odd character.
    guarded = [re.escape(token["content"]) for token in added.values() if not token["special"]]
    if odd:
        guarded.append("[" + "".join(map(re.escape, odd)) + "]")
    return fast, re.compile("|".join(guarded)) if guarded else None


def _is_plain_bpe(model):
    is_bpe = model.get("type", "BPE") == "BPE" and "merges" in model
    options = ("byte_fallback", "continuing_subword_prefix", "dropout")
    return is_bpe and not any(model.get(option) for option in options)


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# single digits are cut out first, and GPT2 sees what lies between: there a digit ahead is the end of the text
DIGITS_GPT2 = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

# in a split, what regex engines disagree on: possessive and lazy quantifiers, {,n}, anchors, looking behind,
# classes in classes, escapes other than \p \s \r \n \t and signs
UNSURE = re.compile(r"(?:[+*?]|[0-9,]\})[+?]|\{,|(?<![\[\\])\^|(?<!\\)\$|\(\?[<>]|&&|\[[^\]]*\[|"
                    r"\\[A-Za-z0-9](?<!\\[pPsSrnt])")


def _split(spec):
    """The one regular expression that a pre_tokenizer of byte-level BPE splits by."""
    steps = spec.get("pretokenizers", [spec]) if spec else []
    kinds = [step["type"] for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        raise NoProof("not byte-level BPE")
    splits_again = steps[-1]["use_regex"]              # by GPT2
    if kinds == ["Split", "ByteLevel"] and not splits_again:
        first = steps[0]
        if first["behavior"] == "Isolated" and not first["invert"] and "Regex" in first["pattern"]:
            return first["pattern"]["Regex"]
    if kinds == ["ByteLevel"] and splits_again:
        return GPT2
    if kinds == ["Digits", "ByteLevel"] and splits_again and steps[0]["individual_digits"]:
        return DIGITS_GPT2
    raise NoProof(f"its text is split by {' + '.join(kinds)}")


def _ranks(model, added):
    """{bytes of a token: id}, tiktoken's merges. NoProof unless they are the model's.

    Both merge the neighbours of best rank: one ranks a listed pair by its place in the list, the other any
    pair by the id of what it makes. If every token, merged alone from its bytes, ends as itself, then only
    its own last pair ever meets: a pair that meets in a longer text has met in the text of the two alone.
    So where, besides, the list is in the order of the ids, both take the same steps.
    """
    byte_of = {letter: byte for byte, letter in _letters().items()}
    vocab = {text: id for text, id in model["vocab"].items() if id not in added}
    letters = {letter for text in vocab for letter in text}
    if not letters <= byte_of.keys():
        raise NoProof("its vocabulary is not spelled in bytes")
    ranks = {bytes(map(byte_of.get, text)): id for text, id in vocab.items()}
    merges = _merges(model)
    results = [model["vocab"][first + second] for first, second in merges]
    if not all(bytes([byte]) in ranks for byte in range(256)) or results != sorted(results):
        raise NoProof("its merges are not in the order of its ids")
    if added.keys() & set(results):
        raise NoProof("its merges make an added token")
    alone = tokenizers.models.BPE(vocab=model["vocab"], merges=[tuple(merge) for merge in merges])
    for text, id in vocab.items():
        if [token.id for token in alone.tokenize(text)] != [id]:
            raise NoProof(f"its token {text!r} is not what its merges make of that text")
    return ranks


# surrogates, private use, planes without a character, and ideographs and Hangul since Unicode 5.2 or before:
# what every edition treats alike
ALIKE = (range(0xD800, 0xF900), range(0x40000, 0xE0000), range(0xF0000, 0x110000), range(0x3400, 0x4DB6),
         range(0x4E00, 0x9FCC), range(0xAC00, 0xD7A4), range(0x20000, 0x2A6D7), range(0x2A700, 0x2B735))


def _odd_characters(tokenizer, fast):
    """Characters that the two encode differently in some neighbourhood."""
    alike = set().union(*ALIKE)
    characters = "".join(chr(code) for code in range(0x110000) if code not in alike)
    blocks = [characters[i:i + 1024] for i in range(0, len(characters), 1024)]
    odd = []
    for block in _differing(tokenizer, fast, blocks):
        odd += _differing(tokenizer, fast, list(block))
    return odd


def _neighbourhoods(characters):
    """A text with each of the characters beside letters, digits, spaces, signs, line breaks and itself."""
    return "".join(f"a{c}A{c}a1{c}1 {c}.{c}{c} \n'{c}\n" for c in characters)


def _differing(tokenizer, fast, blocks):
    """Those of the strings with a character that the two encode differently."""
    probes = [_neighbourhoods(block) for block in blocks]
    expected = tokenizer.encode_batch(probes)
    return [block for block, probe, ids in zip(blocks, probes, expected, strict=True)
            if fast.encode_ordinary(probe) != ids]


def _letters():
    """How a byte is spelled in tokenizer.json: as one letter, as in GPT-2."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    others = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


# -- the toy -------------------------------------------------------------------------------------------------

# How text is split before merging. ASCII only, so that no library's Unicode tables matter: a letter outside
# of ASCII is bytes, like all that is neither letter, digit, space nor line break. Digits stand alone, as
# column arithmetic wants; a space before a digit goes with the sign before it (" + "), an indent with its
# line break.
PATTERN = r" ?</?think>|[ \\]?[A-Za-z]+|[0-9]| ?[^A-Za-z0-9 \n]+(?: (?=[0-9]))?|\n+ *| +"

# Ids 256-507: what saves most tokens over equal shares of world.py's eleven sources (greedily: a whole split
# or a merge of two). A piece stands behind all that it contains; so tiktoken and tokenizers merge alike.
PIECES = (
    "  |at| a|re|in| m|: |er|) | maybe|. | o|What| s|or| t| f| c|es| x|en|on| kg|def|el|it|Write|ed|\\boxed|"
    " b| d| of|al|```|an|st| p| in| \"| km|ar| carry| =| = |le| step| w|et| *|, |ion|):|as|ct|ing|ow| for|"
    " to| g| re|um|om|xs| xs| n| by|ce| l| drives| N| The| Therefore|am| A|il|if|ex| example|ent| ohm| it|"
    " many|ut| cm|us|is| is|un|od|Worked| V| find|ass|im| times| h|ot| Line| (| '|tr|__|pe| paper| do| are|"
    " on|How|\n\n| sum| words|ck| J|ame|ad| add| line|id| * |ist|Assistant| Explain| at| number| C| Tell| +|"
    " + |ch| each|ro| from| <| change|se|self|Exercise|User| self|join| apply|()|all|em| element| remainder|"
    " plus|max|\".| D|ws| compute|ul|Multiplying|',| joined| acts|ter|res| result| None| be|and|._|ver| % |"
    "   | more|lo| flows| divided|th|</think>| </think>|<think>| Python|python| th| the| that| with|ab|"
    " about| above| work| mL| W| What| We|end|    |        |\n    |\n        |\n            |"
    "\n                |ur| current|\"\"|pt|\n\n    | through| make| build| Please| B|ile|ra| range|"
    " acceleration| accelerates|ic| -| - |up|urn|return| returns|lass| min| [|ue| value| limited| default|"
    " So| go|ol|Solve|Solution| Solve| solve|ig| its| an| answer| and| or|ag| voltage| not| as|ption|get|ib|"
    " describe|ction| function|--|----|ec| object"
).split("|")
RANKS = {bytes([byte]): byte for byte in range(256)}
RANKS |= {piece.encode(): 256 + i for i, piece in enumerate(PIECES)}
SPECIALS = {"<|end|>": 508, "<|pad|>": 509, "<|free_a|>": 510, "<|free_b|>": 511}      # two for experiments


class ToyTokenizer(Tokenizer):
    """512 ids: 0-255 are bytes, 256-507 PIECES, 508 <|end|> (the eos), 509 <|pad|>. Encodes with tiktoken."""

    def __init__(self):
        self.encoding = tiktoken.Encoding("prism-toy", pat_str=PATTERN, mergeable_ranks=RANKS,
                                          special_tokens=SPECIALS)
        super().__init__(_toy_files(), eos="<|end|>", pad="<|pad|>")

    def __reduce__(self):
        return type(self), (), {"fast": self.fast}

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts):
        return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def faster(self):
        self.fast = self.encoding
        return "tiktoken"

    def decode(self, ids):
        return self.encoding.decode(self._known(ids))


def toy_tokenizer() -> ToyTokenizer:
    """The tokenizer of the toy presets: the same ids on every machine, nothing to download."""
    return ToyTokenizer()


def _toy_files() -> dict[str, bytes]:
    """The toy as tokenizer.json and tokenizer_config.json."""
    letters = _letters()
    spelled = {token: "".join(map(letters.get, token)) for token in RANKS}
    # tiktoken merges two neighbours that make a piece, wherever the cut; tokenizers wants every cut listed
    merges = []
    for token in RANKS:
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        merges += [[spelled[first], spelled[second]] for first, second in cuts
                   if first in RANKS and second in RANKS]
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": id, "content": text, **flags} for text, id in SPECIALS.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "decoder": level,
        "model": {"type": "BPE", "ignore_merges": True, "merges": merges,          # a whole split is one id
                  "vocab": {text: RANKS[token] for token, text in spelled.items()}},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|pad|>",
              "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": json.dumps(tokenizer, indent=1).encode(),
            "tokenizer_config.json": json.dumps(config, indent=1).encode()}
