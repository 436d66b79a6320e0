"""What ties the package to other libraries; the only place that imports them."""
