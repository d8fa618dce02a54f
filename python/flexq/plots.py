"""What every plot of the package begins with."""


def pyplot():
    """matplotlib's pyplot, which draws into files.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'flexq[plot]'") from None
    return pyplot
