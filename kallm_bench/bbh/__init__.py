"""BIG-Bench Hard: its tasks, how they are asked, how replies are read and scored."""
