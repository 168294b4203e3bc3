"""Files: clouds that come from outside, and what this package saves.

Why was my table refused? `files` (is there such a file), `clouds` (the whole of it), `columns` (which are features), `dialect` and
`cells` (text), `arrays` (.npy and .npz).

How is a cloud read that is not in memory? `opening` tells what it is given; `sources` holds the object that fits see, `blocks`
that of a Dask array, `sums` what both add up. What is read are `streams` of blocks: `array_files` (.npy, .npz, zarr),
`table_files` (text, Parquet by its `row_groups`). How are its points, or their images, written? `writing`.

How is a cloud cut over devices? `placement`.

How is a result saved, and read again? `saving`; in which container? `archive`; what must an object be for that? `validity`.
"""
