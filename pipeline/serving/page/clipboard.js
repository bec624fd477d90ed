// Browsers allow the clipboard only on https and on localhost. Elsewhere the text is selected, so that it can be copied.
export async function copyText(text, element) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const details = element.closest("details");
    if (details) details.open = true;
    getSelection().selectAllChildren(element);
    return document.execCommand("copy");
  }
}
