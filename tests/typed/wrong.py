"""A user's mistakes: `mypy --strict` finds the named error in each line."""

import fastdiff

pipe = fastdiff.load_demo()
fastdiff.compil(pipe)  # attr-defined
fastdiff.compile(pipe, bakend="ort")  # call-arg
fastdiff.compile(pipe, tactics="yes")  # arg-type
fastdiff.compile(pipe, ignore="vae")  # arg-type
fastdiff.Options(vae_tilling="exact")  # call-arg
fastdiff.Options(ort_graphs=None)  # arg-type
str(fastdiff.report(pipe).part)  # attr-defined
fastdiff.roofline(pipe, step=4)  # call-arg
str(fastdiff.compile(pipe).speed)  # attr-defined
