"""What the spectrum does to a network: analyses of finished runs, each a small module.

How to write one, ``convnn/analysis/NAME.py``:

1. ``measure(subject) -> dict`` looks at one run. ``subject`` (``convnn.analysis.subject.Subject``) has the model in
   evaluation mode on its device, the test images of this analysis (``subject.batches()``, ``subject.split`` for the
   pixels as uint8; ``subject.train`` has the training images), ``config``, ``classes``, ``step``, ``seed``. What a
   run's predictions.npz says, ``convnn.analysis.outputs`` gives. It returns plain values that JSON can hold, and

   * under ``"series"``, numbers along something, which the table and ``draw_series`` understand:
     ``{"distance": {"at": ["layer1", "layer2"], "values": [1.5, None]}}``. ``at`` holds names (of layers, in forward
     order) or numbers (bands, severities); ``None`` stands for what is not defined;
   * under ``"arrays"``, NumPy arrays by name, which are kept in an .npz file beside the JSON.

   ``raise NotApplicable("it has no ...")`` where it does not apply to a run.
2. ``headline(result) -> dict[str, float]`` picks the few numbers that become columns of the report.
3. ``draw(arms) -> Figure`` draws the results of all arms (``convnn.analysis.base.ArmResults``: a name, the values that
   tell it from the others, the results by seed), averaged over seeds with intervals; ``convnn.analysis.drawing`` has
   ``draw_series`` (over depth or numbers, a line an arm) and ``draw_headline`` (over blend, else k). Call it through
   ``figure_of``, which sets the style.
4. ``ANALYSIS = Analysis(title, source, measure, headline, draw, images=256)`` at the end of the module, and a line in
   ``convnn.analysis.registry.ANALYSES``. Raise ``version`` whenever the numbers come out differently, so that what
   runs have kept is measured again.

``convnn.analysis.variance`` is a short example. Results are kept in ``RUN/analyses/NAME.json``.
"""
