"""This package holds where time goes: in kernels, and in the steps of an engine. It does not know argv.

`kernels` has what every kernel compiles to and how much work it has at a model's sizes, timed where that is possible;
`steps` runs an engine and takes its steps apart. Both return a document, plain JSON, which `history` compares with
older ones and `kernel_page` and `step_page` show.
"""
