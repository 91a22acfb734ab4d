"""Configuration of the tiny remote model; `layout` says which kind of Mixture of Experts it has."""

from transformers import PretrainedConfig


class TinyMoeConfig(PretrainedConfig):
    model_type = "tiny_moe"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        layout="mixtral",
        vocab_size=96,
        hidden_size=64,
        intermediate_size=40,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        aux_loss_alpha=0.01,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        max_position_embeddings=256,
        use_cache=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=94,
        **kwargs,
    ):
        self.layout = layout
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.moe_intermediate_size = moe_intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.n_routed_experts = n_routed_experts
        self.n_shared_experts = n_shared_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.first_k_dense_replace = first_k_dense_replace
        self.aux_loss_alpha = aux_loss_alpha
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        super().__init__(pad_token_id=pad_token_id, bos_token_id=bos_token_id, eos_token_id=eos_token_id, **kwargs)
