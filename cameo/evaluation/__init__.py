"""One evaluation for all backbones."""
