"""The names and shapes of a Llama's tensors, in Hugging Face's words and orientation ([out, in])."""

from collections.abc import Collection, Mapping

TOP = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
LAYER = {
    "attn_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
ATTENTION_BIAS = {part: LAYER[part].replace(".weight", ".bias") for part in ("q", "k", "v", "o")}
MLP_BIAS = {part: LAYER[part].replace(".weight", ".bias") for part in ("gate", "up", "down")}


def hf_name(layer: int | None, part: str, *, bias: bool = False) -> str:
    """hf_name(3, "q") -> "model.layers.3.self_attn.q_proj.weight"; layer None for embed, norm and head."""
    if layer is None:
        return TOP[part]
    return f"model.layers.{layer}.{(ATTENTION_BIAS | MLP_BIAS)[part] if bias else LAYER[part]}"


def tensor_shapes(
    dims: Mapping[str, int], *, tie: bool, attention_bias: bool = False, mlp_bias: bool = False
) -> dict[str, tuple[int, ...]]:
    """dims {"L", "E", "H", "K", "D", "F", "V"} -> every tensor of the checkpoint and its shape; no head when tied."""
    embed, mlp, vocab = dims["E"], dims["F"], dims["V"]
    heads, kv_heads = dims["H"] * dims["D"], dims["K"] * dims["D"]
    parts: dict[str, tuple[int, ...]] = {
        "attn_norm": (embed,),
        "q": (heads, embed),
        "k": (kv_heads, embed),
        "v": (kv_heads, embed),
        "o": (embed, heads),
        "mlp_norm": (embed,),
        "gate": (mlp, embed),
        "up": (mlp, embed),
        "down": (embed, mlp),
    }
    biased = [*(ATTENTION_BIAS if attention_bias else ()), *(MLP_BIAS if mlp_bias else ())]
    shapes = {hf_name(None, "embed"): (vocab, embed)}
    for layer in range(dims["L"]):
        shapes |= {hf_name(layer, part): shape for part, shape in parts.items()}
        shapes |= {hf_name(layer, part, bias=True): parts[part][:1] for part in biased}
    shapes[hf_name(None, "norm")] = (embed,)
    if not tie:
        shapes[hf_name(None, "head")] = (vocab, embed)
    return shapes


def tensor_names(num_layers: int, *, tie: bool, attention_bias: bool = False, mlp_bias: bool = False) -> list[str]:
    """Every tensor of the checkpoint, in the order of its layers."""
    dims = dict.fromkeys("EHKDFV", 1) | {"L": num_layers}
    return list(tensor_shapes(dims, tie=tie, attention_bias=attention_bias, mlp_bias=mlp_bias))


def stored_name(name: str, stored: Collection[str]) -> str:
    """The name of a decoder's tensor as a checkpoint has it: those published without a head have no "model." before
    their names."""
    bare = name.removeprefix("model.")
    return bare if name not in stored and bare in stored else name
