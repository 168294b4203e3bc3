"""A job is one object: a configuration in TOML, what it names, the work, tables and pictures; and the folder that is left.

What is asked of a job? `job`. Which are there? `registry`: a new one is a file like `fit`, `graph`, `choose`, `barycenter` or
`flow`, and a line there. Which keys has a configuration? Its job's file; what several share is in `config`, coupled fits in
`coupled`, and `sections` reads them all. The clouds and mixtures that it names? `clouds` of a pair, `nodes` of a graph,
`mixtures`. What does a run leave? `run`, whole or not at all by `folders`. How are tables printed? `tables`, on `terminal`. Where
are compiled programs kept from one command to the next? `cache`.

Many jobs are a batch. Which are they? `batch`, from the rows of a `manifest`. Where do they run? `workers`, this process or Dask's.
What is written, and read again by whoever goes on? `parts`. What is left to do, and how far is it? `execution`.
"""
