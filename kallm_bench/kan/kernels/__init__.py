"""THE SPEED: what kan/bases says in PyTorch, said again in Triton. Plain tensors in and out; no basis is known here.

In the order in which they read best: `layer`, the operators that PyTorch sees, and `plans`, which way each goes;
`library`, the simplest way, with its `passes`; `recurrence`, what becomes of one value; `fused`, all in one kernel;
`hopper` with `hopper_kernels` and `hopper_slopes`, where warps divide the work, and with `hopper_halves` and
`hopper_halves_gradient`, where features stay in registers. B-splines and Gaussians have many functions, and go by one
at a time: `bells`, what becomes of one value there, `fused_local` and `hopper_local`. `local`, which touches the few of
them that are not zero, and `rational` stand by themselves, on `tiles`. NOTES.md tells what was tried, expected and
found.
"""
