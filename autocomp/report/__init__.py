"""What a person sees of a study: live view, tables, web page, MLflow. Reads studies, owns no data."""
