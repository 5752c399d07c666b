"""The atoms that every formula is written in, once per array library.

A backend is a module, passed around as ``xp``. All three supply the same convex atoms
(`pos`, `abs`, `square`, `softplus`, `norm`, `multiply`, `sum`, `row_sum`, `row_max`, `columns`,
`scatter`, `take`, `outer`), so that a formula of a loss, a perturbation set or a program reads the
same for numbers (`numpy`), for a modelling language (`cvxpy`) and for tensors (`torch`). The numpy
and torch backends add the few plain array functions that the geometry of an attack needs.
"""
