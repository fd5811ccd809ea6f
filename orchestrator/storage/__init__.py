"""Writing results so that nothing is lost or half written."""
