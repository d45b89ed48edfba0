"""KANs in language models, benchmarked."""
