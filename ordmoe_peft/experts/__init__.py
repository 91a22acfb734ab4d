"""LoRA on fused experts and routers, and the experts forward that applies it.

Shape suffixes, in this folder and in `tiers/ranking.py`: B batch, S sequence, T = B·S tokens, H hidden, F expert
width, E experts, K experts per token, R LoRA rank, N = T·K routed rows, I and O the two sides of a projection.
"""
