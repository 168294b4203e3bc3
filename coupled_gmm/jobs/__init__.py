"""A job: a configuration in TOML, what it names, the work, and the folder that is left.

Which keys has a configuration? `config`, read by `sections`. The mixtures that it names? `mixtures`. What does a run leave? `run`,
whole or not at all by `folders`. What is printed? `tables`, on `terminal`.
"""
