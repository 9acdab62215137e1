"""Text to ids and back: the seven models through the `tokenizers` library, and a vocabulary of 512 for the toy world.

Three rules make the ids of a document the same everywhere (each broken rule is a known bug of some code base):
  1. encode() neither adds special ids nor reads them out of the text: "</s>" in a web page is three characters of
     prose, never the document separator. Whether an added token is special is the flag in tokenizer.json: Granite-4's
     <think> is matched if its file says `special: false`.
  2. The ids around a document are placed here, in Tokenizer.documents(), and nowhere else: no post-processor is trusted.
  3. save() writes back the files that were loaded, byte for byte, so transformers and vLLM read what we read.

The toy is a tiktoken Encoding built from the constants below (named encodings are downloaded, ours is not); its ids equal
those of the tokenizer.json that it saves. Ids 0-255 are the bytes, 256-509 PIECES in order, 510 <|end|>, 511 <|pad|>.

    tok = load_tokenizer("checkpoints/granite-4-h-micro")      tok = toy_tokenizer()
    tok.decode(tok.encode("2 + 2 = 4")) == "2 + 2 = 4"         tok.document("one page") -> [..., tok.eos_id]
"""
import functools
import hashlib
import json
import os
from pathlib import Path

import tiktoken
import tokenizers

# what a folder may hold; tokenizer.json defines the ids, the rest is carried along for those who read the folder
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
         "merges.txt", "tokenizer.model", "tekken.json", "chat_template.jinja")


# -- one tokenizer ----------------------------------------------------------------------------------------------------
class Tokenizer:
    """What one folder's tokenizer files say. Made by load_tokenizer or toy_tokenizer; safe to pickle.

    eos_id, bos_id, pad_id: ids, the last two None where the model has none.
    vocab_size: 1 + the largest id this can emit. A model's embedding may be taller (Granite-4 is padded to 100352).
    fingerprint: sha256 of all that decides the ids of documents() (vocabulary, merges, pre-split, normalizer, added
        tokens, bos, eos), not of the file's spelling; the same after save and load.
    """

    def __init__(self, files: dict[str, bytes], eos_id: int, bos_id: int | None = None, pad_id: int | None = None):
        """files: name -> content, tokenizer.json among them. Raises ValueError where it or an id makes no sense."""
        self.files, self.eos_id, self.bos_id, self.pad_id = files, eos_id, bos_id, pad_id
        spec = json.loads(files["tokenizer.json"])
        self.backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        self.backend.encode_special_tokens = True      # rule 1; not stored in the file and lost by pickle: set it here
        self.backend.no_truncation()                   # a file saved by a fine-tuning script may cut every text at 512
        self.backend.no_padding()
        self.vocab_size = 1 + max(self.backend.get_vocab(with_added_tokens=True).values())
        for kind, id in (("eos", eos_id), ("bos", bos_id), ("pad", pad_id)):
            if (id is not None or kind == "eos") and not (isinstance(id, int) and 0 <= id < self.vocab_size):
                raise ValueError(f"{kind} id is {id}, the vocabulary has 0 to {self.vocab_size - 1}: "
                                 f"correct {kind}_token_id in config.json or {kind}_token in tokenizer_config.json")
        if isinstance(merges := spec["model"].get("merges"), list):              # "a b" before 2024, ["a", "b"] since
            spec["model"]["merges"] = [m.split(" ") if isinstance(m, str) else m for m in merges]
        spec = {key: spec.get(key) for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
        text = json.dumps([spec, eos_id, bos_id], sort_keys=True)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def __reduce__(self):
        return type(self), (self.files, self.eos_id, self.bos_id, self.pad_id)

    def encode(self, text: str) -> list[int]:
        """Ids of the text and of nothing else: no bos, no eos, and no special id whatever the text spells. A lone
        surrogate (half of a broken JSON escape, not text) is read as U+FFFD."""
        return self.backend.encode(_unicode(text), add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """encode() of each, on all cores."""
        batch = self.backend.encode_batch_fast([_unicode(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, special tokens spelled out; bytes that are not UTF-8 become U+FFFD. Byte-level vocabularies give
        decode(encode(t)) == t. SentencePiece (Mistral-7B) drops one leading space, so decode a whole text, not its parts.
        Raises ValueError for an id outside the vocabulary (the library would skip it in silence)."""
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            wrong = next(id for id in ids if not 0 <= id < self.vocab_size)
            raise ValueError(f"cannot decode id {wrong}: the tokenizer's vocab_size is {self.vocab_size}. Padded rows of a "
                             "model's head have no text; do not sample them")
        return self.backend.decode(ids, skip_special_tokens=False)

    def documents(self, texts: list[str]) -> list[list[int]]:
        """Each text as a training document: bos first if there is a bos that is not the eos, eos last. So Granite gets
        [..., eos] and Llama, Mistral and Nemotron [bos, ..., eos]."""
        head = [] if self.bos_id in (None, self.eos_id) else [self.bos_id]
        return [head + ids + [self.eos_id] for ids in self.encode_batch(texts)]

    def document(self, text: str) -> list[int]:
        """documents() of one text."""
        return self.documents([text])[0]

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files, as they were loaded, for load_tokenizer, transformers and vLLM to read."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# -- from a folder ----------------------------------------------------------------------------------------------------
def load_tokenizer(folder: str | Path, config: dict | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    config: the folder's config.json; where it has bos_token_id, eos_token_id (a list counts by its first) or pad_token_id,
        that id is taken, null included; where it has not, the id comes from bos_token, ... of tokenizer_config.json.
    Raises FileNotFoundError where there is no tokenizer.json, ValueError where it cannot be read or no eos is named.
    """
    folder, config = Path(folder), config or {}
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    if "tokenizer.json" not in files:
        found = [name for name in ("tokenizer.model", "tekken.json", "vocab.json") if name in files]
        raise FileNotFoundError(f"no tokenizer.json in {folder}" + (
            "" if folder.is_dir() else " (no such folder)") + (
            f"; there is {' and '.join(found)}, which transformers can convert: "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})" if found else
            "; fetch the model's tokenizer.json and tokenizer_config.json into it"))
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))

    def special(kind: str) -> int | None:
        if (key := f"{kind}_token_id") in config:
            return config[key][0] if isinstance(config[key], list) else config[key]
        token = settings.get(f"{kind}_token")
        token = token["content"] if isinstance(token, dict) else token
        return None if token is None else vocab[token]
