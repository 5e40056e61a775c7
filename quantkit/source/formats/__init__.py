"""How weights are stored: a module for each kind of format, with its grouping and its reader.

A module's `group...` functions make a `Weight` of stored tensors, checking every shape and dtype;
its `read...` functions give rows of one. What a reader has to know beyond the tensors is in
`Weight.layout`, an object of the module's own.
"""
