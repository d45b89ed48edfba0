"""`python -m kallm_bench.cli`, which torchrun and accelerate can start on several processes."""

from kallm_bench.cli import main

if __name__ == "__main__":
    main()
