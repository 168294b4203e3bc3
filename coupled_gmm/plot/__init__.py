"""Pictures, and no mathematics: imported where they are drawn, since matplotlib is slow to import.

Each function draws what it says and returns the matplotlib figure (or takes the axes to draw on). Figures are free of
pyplot's global state: nothing leaks when many are drawn. In a notebook,
`%matplotlib inline` makes them show themselves. `import coupled_gmm` does not import this folder, nor matplotlib.

Mixtures? `mixtures`. Plans, links, interpolation? `plans`. Clouds and the history of a coupled fit? `fits`. Barycenters, flows
and animations? `barycenters`. Masses along a time course? `courses`. What was chosen, and intervals? `choices`. The palette, and
what all share? `style`.
"""
