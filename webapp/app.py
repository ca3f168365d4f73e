"""The web app: three pages on top of the API. Run it with `streamlit run webapp/app.py`."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

import parts

st.set_page_config(page_title="lawnwatch", page_icon="🌼", layout="wide", initial_sidebar_state="collapsed")
st.logo(Path(__file__).with_name("logo.svg"), size="medium")
parts.style()

page = st.navigation(
    [
        st.Page("pages/predict.py", title="Predict", icon=":material/image_search:", default=True),
        st.Page("pages/model.py", title="Model", icon=":material/monitoring:", url_path="model"),
        st.Page("pages/history.py", title="History", icon=":material/history:", url_path="history"),
    ],
    position="top",
)
page.run()
