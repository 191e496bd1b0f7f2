/* Loads a bundle and streams an answer to a prompt: c_minimal BUNDLE PROMPT */
#include <dynexport/dynexport.h>
#include <stdio.h>
#include <string.h>

static int print(void* user, const dynexport_token* token) {
  (void)user;
  fwrite(token->text, 1, token->text_bytes, stdout);
  return fflush(stdout); /* cancels if nobody reads */
}

int main(int count, char** arguments) {
  dynexport_model* model = NULL;
  int64_t* ids = NULL;
  size_t length = 0;
  if (count != 3) {
    fprintf(stderr, "usage: c_minimal BUNDLE PROMPT\n");
    return DYNEXPORT_BAD_INPUT;
  }
  dynexport_status status = dynexport_open(arguments[1], NULL, &model);
  if (status == DYNEXPORT_OK) status = dynexport_encode(model, arguments[2], strlen(arguments[2]), &ids, &length);
  if (status == DYNEXPORT_OK) status = dynexport_generate(model, ids, length, NULL, print, NULL);
  if (status == DYNEXPORT_OK) printf("\n");
  if (status != DYNEXPORT_OK) fprintf(stderr, "error: %s\n", dynexport_last_error());
  dynexport_free(ids);
  dynexport_close(model);
  return status;
}
