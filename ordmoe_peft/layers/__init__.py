"""LoRA on fused experts and routers, and the experts forward that applies it."""
