"""THE SPEED: what kan/bases says in PyTorch, said again in Triton. Plain tensors in and out; no basis is known here."""
