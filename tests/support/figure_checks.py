"""What a figure must not do, whatever it shows."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text


def texts_outside(figure):
    """Return the texts of a figure that its borders cut, once it is drawn."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer, whole = canvas.get_renderer(), figure.bbox.padded(0.5)
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    shown = [text for text in shown if text.axes is None or text.axes.get_visible()]
    boxes = [(text, text.get_window_extent(renderer)) for text in shown]
    hidden = {id(label) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in off_axis(axis)}
    return [
        text.get_text()
        for text, box in boxes
        if id(text) not in hidden and (box.x0 < whole.x0 or box.x1 > whole.x1 or box.y0 < whole.y0 or box.y1 > whole.y1)
    ]


def off_axis(axis):
    """Return the labels of ticks that lie outside an axis' limits, which are not drawn."""
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    return [tick.label1 for tick in ticks if not low <= tick.get_loc() <= high]
