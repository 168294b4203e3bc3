"""Files: clouds that come from outside, and what this package saves.

Why was my table refused? `clouds` (which columns, which rows), `dialect` (text), `arrays` (.npy and .npz). How is a result
saved, and read again? `saving`; in which container? `archive`; what must an object be for that? `validity`.
"""
