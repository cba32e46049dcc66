"""GGUF metadata -> a Hugging Face tokenizer. Imports no jax.

Two families: byte-level BPE ("gpt2"), whose way of cutting text is named by `tokenizer.ggml.pre`, and SentencePiece BPE
with byte fallback ("llama"), whose merges follow from the pieces' scores.
Source of the cuts: llama.cpp, src/llama-vocab.cpp (llm_tokenizer_bpe).
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from checkpoints.files import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "smaug-bpe", "dbrx", "pixtral"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), _QWEN2),
    "tekken": _TEKKEN,
}
_GPT2 = ("gpt-2", "gpt2", "olmo", "phi-2", "mpt", "jina-en")
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
# These begin a text with BOS unless told otherwise, and take a whole word that is in the vocabulary before any merge.
_LLAMA3_FAMILY = ("llama3", "llama-v3", "llama-bpe", "tekken", "falcon3", "pixtral")


def build_tokenizer(path: str, metadata: Mapping[str, Any]) -> Tokenizer:
    """Metadata of the GGUF file at path -> a tokenizer that cuts and decodes as llama.cpp does.

    Raises CheckpointError when the file holds no vocabulary or names a model or pre-tokenizer that is not known.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise CheckpointError(f"{path} holds no vocabulary (tokenizer.ggml.tokens); give a folder with tokenizer.json")
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(path, metadata)
    elif kind == "llama":
        tokenizer = _sentencepiece(path, metadata)
    else:
        raise CheckpointError(f"{path} has a tokenizer of model {kind!r}; 'gpt2' and 'llama' are known")
    _add_special_tokens(tokenizer, metadata)
    _add_ends(tokenizer, metadata)
    return tokenizer


def tokenizer_config(path: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: special tokens by their text, and the chat templates."""
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _adds_bos(metadata),
        "add_eos_token": bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        "model_max_length": metadata.get(f"{metadata.get('general.architecture')}.context_length"),
    }
    for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and not 0 <= number < len(tokens):
            raise CheckpointError(f"{path}: {key}_token_id is {number}; the vocabulary has {len(tokens)} tokens")
        config[f"{name}_token"] = tokens[number] if number is not None else None
    template = metadata.get("tokenizer.chat_template")
    named = {
        name: metadata[f"tokenizer.chat_template.{name}"]
        for name in metadata.get("tokenizer.chat_templates", ())
        if f"tokenizer.chat_template.{name}" in metadata
    }
    if named and template is not None:
        named = {"default": template} | named
    if named:
        config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    elif template is not None:
        config["chat_template"] = template
    return {name: value for name, value in config.items() if value is not None}


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    default = metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") in _LLAMA3_FAMILY
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default))


def _byte_level(path: str, metadata: Mapping[str, Any]) -> Tokenizer:
    merges = metadata.get("tokenizer.ggml.merges")
    if merges is None:
        raise CheckpointError(f"{path} has a BPE vocabulary without tokenizer.ggml.merges")
    vocab = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    pre = metadata.get("tokenizer.ggml.pre")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre in _LLAMA3_FAMILY))
    tokenizer.pre_tokenizer = _pre_tokenizer(path, pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(path: str, pre: str | None) -> pre_tokenizers.PreTokenizer:
    if pre in _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in _DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    if pre in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join(sorted({*_GPT2, *_DIGITS, *_SPLITS}))
    raise CheckpointError(
        f"{path} names the pre-tokenizer {pre!r}, which is not known ({known} are); "
        "give the model's Hugging Face folder, whose tokenizer.json says how text is cut"
    )


def _sentencepiece(path: str, metadata: Mapping[str, Any]) -> Tokenizer:
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        found = "none" if scores is None else len(scores)
        raise CheckpointError(f"{path} has {len(tokens)} SentencePiece tokens and {found} scores; expected one each")
    kinds = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    mergeable = {token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges_from_scores(vocab, scores, mergeable),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    strip: list[decoders.Decoder] = []
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        strip = [decoders.Strip(" ", 1, 0)]
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_from_scores(vocab: Mapping[str, int], scores: list[float], mergeable: set[str]) -> list[tuple[str, str]]:
    """All pairs of pieces that form a piece, best score first: the order in which SentencePiece merges.

    Ties (a piece that is formed in several ways) go to the pair of earlier pieces, as transformers does.
    """
    pairs = []
    for token in mergeable:
        found = [
            (vocab[left], vocab[right], left, right)
            for left, right in ((token[:cut], token[cut:]) for cut in range(1, len(token)))
            if left in mergeable and right in mergeable
        ]
        pairs += [(-scores[vocab[token]], vocab[token], *pair) for pair in sorted(found)]
    return [(left, right) for *_, left, right in sorted(pairs)]


def _add_special_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Tokens that are matched whole in the text; control tokens are left out of decoded text on request."""
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type") or ()
    named = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "unknown", "padding")]
    special = {tokens[number] for number in named if number is not None and 0 <= number < len(tokens)}
    control = [token for token, kind in zip(tokens, kinds, strict=False) if kind == CONTROL or token in special]
    control = control or sorted(special)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    plain = [token for token, kind in zip(tokens, kinds, strict=False) if kind == USER_DEFINED and token not in special]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])


def _add_ends(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """What encode(add_special_tokens=True) puts before and after the text."""
    tokens = metadata["tokenizer.ggml.tokens"]
    bos, eos = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos"))
    before = [(tokens[bos], bos)] if bos is not None and _adds_bos(metadata) else []
    after = [(tokens[eos], eos)] if eos is not None and metadata.get("tokenizer.ggml.add_eos_token") else []
    byte_level = metadata.get("tokenizer.ggml.model") == "gpt2"
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False)] if byte_level else []
    if before or after:
        single = [*(f"{token}:0" for token, _ in before), "$A:0", *(f"{token}:0" for token, _ in after)]
        pair = [*single, *(f"{token}:1" for token, _ in before), "$B:1", *(f"{token}:1" for token, _ in after)]
        steps.append(processors.TemplateProcessing(single=single, pair=pair, special_tokens=[*before, *after]))
    if steps:
        tokenizer.post_processor = processors.Sequence(steps)
