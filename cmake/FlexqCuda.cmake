# Decides whether the CUDA backend is built: FLEXQ_HAS_CUDA.
set(FLEXQ_HAS_CUDA OFF)
